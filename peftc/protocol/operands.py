"""What a rewrite asks for by name: state and a stage's operands, held against what there is when a method registers."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from peftc.protocol import Lazy, Tensor, torch
from peftc.protocol.params import Configured, Param, taken_in_modules
from peftc.protocol.site import Site

if TYPE_CHECKING:
    from torch._subclasses import fake_tensor

    from peftc.graph import ir
else:
    ir, fake_tensor = Lazy("peftc.graph.ir"), Lazy("torch._subclasses.fake_tensor")

# What lies beside the state of a method: the rows of a slice that is no range, the ends of groups of tokens.
ROWS, OFFSETS = "rows", "offsets"


def wanted(function: Callable[..., Any], given: int, known: Iterable[str] = ()) -> tuple[str, ...]:
    """The names a rewrite asks for behind its first `given` parameters; `**state` asks for all that are `known`."""
    named, everything = _asked(function, given)
    return (*named, *(name for name in known if name not in named)) if everything else named


def check_operands(cls: Any, kinds: Iterable[type[Site]]) -> None:
    """Holds every rewrite that a method class defines against its stage.

    Which state there is depends on the site and the parameters: sites that their kinds give as samples are asked for,
    with the defaults and with each parameter set otherwise. A combinator takes the operands of the method inside.

    Raises:
        TypeError: with the operand that there is not and the nearest that there is, or what a rewrite is given first.
    """
    for name, (given, operands) in cls.rewrites.items():
        function = getattr(cls, name)
        if function.__module__ == "peftc.protocol.method":
            continue  # not defined
        leading = tuple(inspect.signature(function).parameters)[1 : len(given) + 1]
        if leading != given:
            raise TypeError(
                f"{cls.__name__}.{name} is given ({', '.join(given)}) and then what it asks for by name, "
                f"and it takes ({', '.join(leading)})"
            )
        asked = wanted(function, len(given) + 1)
        if unknown := set(asked) - set(operands):
            state = _state_names(cls, list(kinds), unknown)
            if state is not None and (odd := sorted(unknown - state)):
                near = difflib.get_close_matches(odd[0], [*state, *operands], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(
                    f"{cls.__name__}.{name} asks for {odd[0]!r}, which is no state of it and no operand{hint} "
                    f"(state: {', '.join(sorted(state))}; operands: {', '.join(operands) or 'none'})"
                )


def check_state(cls: Any, kinds: Iterable[type[Site]]) -> None:
    """Holds the names of state, as samples have it with the defaults, against operands and what a module has already.

    Raises:
        TypeError: with the name, and what has it.
    """
    given = {name for leading, operands in cls.rewrites.values() for name in (*leading, *operands)} | {ROWS, OFFSETS}
    for made in islice(_instances(cls), 1):
        for site in (site for kind in kinds for site in kind.samples() if made.refuses(site) is None):
            for name in (*made.state(site), *made.shares([site])[0]):
                reason = "a rewrite is given something else by that name" if name in given else None
                reason = reason or next(filter(None, map(taken_in_modules, name.split("."))), None)
                if reason:
                    raise TypeError(f"{cls.__name__} keeps {name!r} as state: {reason}")


def changes_a_weight(method: Any, site: Any) -> bool:
    """Whether all that a method does at a linear layer, while training too, is what its `fold` says of the weight.

    Its rewrite must not go by whether the model is training, and draw no random numbers, as a dropout does.
    """
    if method.unmergeable is not None:
        return False
    entering = method.rewrites_input(site)
    state = {**method.state(site), **method.shares([site])[0]}
    names = method.asks_input(state) if entering else method.asks(state)
    if "training" in names:
        return False
    dtypes = {name: one.dtype or torch.float32 for name, one in state.items()}
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        known = {name: torch.empty(one.shape, dtype=dtypes[name]) for name, one in state.items()}
        known |= {"weight": torch.empty(site.n_out, site.n_in), "bias": torch.empty(site.n_out)}
        leading = [torch.empty(2, 3, site.n_in), *([] if entering else [torch.empty(2, 3, site.n_out)])]
    given = [name for name in names if name in known]

    def rewritten(*values: Tensor) -> Tensor:
        rewrite = method.rewrite_input if entering else method.rewrite
        named = dict(zip(given, values[len(leading) :], strict=True))
        absent = {name: None for name in names if name not in known and name != "here"}
        found: Tensor = rewrite(site, *values[: len(leading)], **absent, **named)
        return found

    nodes = ir.trace(rewritten, *leading, *(known[name] for name in given)).nodes
    return not any(torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in nodes)


def _state_names(cls: Any, kinds: list[type[Site]], until: set[str]) -> set[str] | None:
    """The names of all state that samples have, until they are all of `until`; None where there is no sample."""
    found: set[str] = set()
    sites = [site for kind in kinds for site in kind.samples()]
    asked = False
    for made in _instances(cls):
        for site in sites:
            if made.refuses(site) is None:
                found |= {*made.state(site), *made.shares([site])[0]}
                asked = True
        if until <= found:
            break
    return found if asked else None


def _instances(cls: Any) -> Iterator[Any]:
    """A method with its defaults, and with each parameter set otherwise; none of a class that needs a parameter."""
    if any(parameter.required for parameter in cls.parameters.values()):
        return
    settings = ({name: other} for name, parameter in cls.parameters.items() for other in _others(parameter))
    for given in chain([{}], settings):
        made: Configured = cls(**given)
        if made.conflict() is None:
            yield made


def _others(parameter: Param) -> list[Any]:
    """Values beside the default."""
    if parameter.choices:
        return [choice for choice in parameter.choices if choice != parameter.default]
    if parameter.kind is bool:
        return [not parameter.default]
    if parameter.kind is int and parameter.optional:
        return [int(parameter.min or 0) + 1]
    return []


@cache
def _asked(function: Callable[..., Any], given: int) -> tuple[tuple[str, ...], bool]:
    parameters = tuple(inspect.signature(function).parameters.values())[given:]
    named = tuple(item.name for item in parameters if item.kind is not item.VAR_KEYWORD)
    return named, len(named) < len(parameters)
