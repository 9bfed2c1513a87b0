"""Methods on blocks: what one statement names in one stack is a chain, along which a rewrite hands a value upwards.

A rewrite that asks for `carry` gets what it returned beside its output at the block before (None at the first) and
returns the pair of output and carry. Where the block's attention reads another chain, as a decoder reads its encoder,
`memory` is the carry at the end of that one, and `attend` what the attention makes of values of the rewrite's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor, fx

from peftc.graph.ir import Provenance, is_tensor, redirect, value
from peftc.planning.plan import Binding
from peftc.protocol.site import Block, Reading
from peftc.rewrite.splicer import Splicer, of_method

ATTEND = "attend "


def onto_block(splicer: Splicer, binding: Binding, state: dict[str, fx.Node], stamp: Provenance) -> None:
    """Splices a method behind its block's hidden state, with what its chain carries."""
    site, method = binding.site, binding.method
    assert isinstance(site, Block)
    assert site.x is not None
    assert site.h is not None
    names = method.asks(binding.names)
    x, y = (splicer.current.get(node, node) for node in (site.x, site.h))
    given = dict(state)
    if "carry" in names and site.before is not None:
        given["carry"] = splicer.carries[binding.statement, site.before.name]
    if "memory" in names and site.memory is not None and site.reading is not None:
        given["memory"] = splicer.carries[binding.statement, site.memory.name]
        given |= _operands(site.reading)

    def function(x: Tensor, y: Tensor, *tensors: Tensor) -> Any:
        values: dict[str, Any] = dict(zip(given, tensors, strict=True))
        if "memory" in values and site.reading is not None:
            values["attend"] = _attending(site.reading, values)
        return method.rewrite(site, x, y, **{name: values.get(name) for name in names})

    args = [x, y, *given.values()]
    facts = of_method(method, site, given), tuple(binding.names), _constants(site.reading)
    template = splicer.templates.get(function, facts, [value(node) for node in args])
    result, made = splicer.splice(template, args, y, stamp)
    _same_randomness(site.reading, made)
    if "carry" in names:
        result, splicer.carries[binding.statement, site.name] = cast(tuple[fx.Node, fx.Node], result)
    if result is not y:
        redirect(y, result, keep=made)
        splicer.current[site.h] = result


# ---- Another's attention ---------------------------------------------------------------------------------------------


def _operands(reading: Reading) -> dict[str, fx.Node]:
    """The tensors that the attention's weights are made of (the weights themselves, where it is spelt out)."""
    places = [*enumerate(reading.out.args), *reading.out.kwargs.items()]
    return {
        f"{ATTEND}{place}": argument
        for place, argument in places
        if isinstance(argument, fx.Node) and place != reading.values and is_tensor(argument)
    }


def _constants(reading: Reading | None) -> str:
    if reading is None:
        return ""
    plain = [None if isinstance(argument, fx.Node) else argument for argument in reading.out.args]
    named = {name: None if isinstance(given, fx.Node) else given for name, given in reading.out.kwargs.items()}
    return f"{reading.out.target} {plain} {named}"


def _attending(reading: Reading, operands: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """values [B, S, n] -> [B, T, n]: the mean over the heads of what each makes of them."""
    replaced = reading.out.args[reading.values]
    assert isinstance(replaced, fx.Node)
    heads, dtype = value(replaced).shape[1], value(replaced).dtype
    args = [_operand(operands, place, given) for place, given in enumerate(reading.out.args)]
    kwargs = {name: _operand(operands, name, given) for name, given in reading.out.kwargs.items()}

    def attend(values: Tensor) -> Tensor:
        args[reading.values] = values.to(dtype).unsqueeze(1).expand(-1, heads, -1, -1)
        mixed: Tensor = cast(Any, reading.out.target)(*args, **kwargs)
        return mixed.mean(1).to(values.dtype)

    return attend


def _operand(operands: dict[str, Any], place: object, given: Any) -> Any:
    """A tensor from the trace; a number as the graph has it (the fake one of a node, until `_same_randomness`)."""
    if not isinstance(given, fx.Node):
        return given
    tensor = operands.get(f"{ATTEND}{place}")
    return given.meta["val"] if tensor is None else tensor.detach()


def _same_randomness(reading: Reading | None, made: Sequence[fx.Node]) -> None:
    """A dropout probability that the graph computes from `training` is not a tensor, and a trace makes it constant."""
    if reading is None:
        return
    for node in made:
        if node.target is reading.out.target:
            for place, given in enumerate(reading.out.args):
                if isinstance(given, fx.Node) and not is_tensor(given):
                    node.update_arg(place, given)
            for name, given in reading.out.kwargs.items():
                if isinstance(given, fx.Node) and not is_tensor(given):
                    node.update_kwarg(name, given)
