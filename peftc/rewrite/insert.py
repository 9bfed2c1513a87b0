"""Bindings -> nodes at linear layers, experts and sublayers: what a site gives out, or reads, becomes another value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from peftc.graph.ir import Provenance, redirect, value
from peftc.planning.plan import Binding
from peftc.planning.tasks.by_row import WHICH
from peftc.protocol.method import Here
from peftc.protocol.operands import OFFSETS, ROWS
from peftc.protocol.site import Block, Projection, Sublayer, Use
from peftc.rewrite.blocks import onto_block
from peftc.rewrite.splicer import HERE, TRAINING, Splicer, of_method
from peftc.rewrite.weights import dense_weight, product_like, put, take, with_all_rows, within


def insert(splicer: Splicer, binding: Binding, pass_name: str) -> None:
    """The binding's nodes, at every use of its site."""
    stamp = Provenance(pass_name, binding.site.name, binding.span)
    match binding.site:
        case Projection() as site if site.within:
            _into_weight(splicer, binding, site, stamp)
        case Projection(uses=uses) if binding.method.rewrites_input(binding.site):
            for use in uses:
                _into_input(splicer, binding, use, stamp)
        case Projection(uses=uses):
            for use in uses:
                _onto(splicer, binding, use.y, use.x, use, stamp)
        case Block():
            state = _operands(splicer, binding, binding.method.asks(binding.names), stamp)
            onto_block(splicer, binding, state, stamp)
        case site:
            (y, *_), (x, *_) = site.changes(), site.reads()
            entry = site.entry if isinstance(site, Sublayer) and site.entry else Use(y, y, 0)
            _onto(splicer, binding, y, splicer.current.get(x, x), replace(entry, offsets=None), stamp)


def _onto(splicer: Splicer, binding: Binding, y: fx.Node, x: fx.Node, use: Use, stamp: Provenance) -> None:
    """Replaces the output `y` by the method's; `use` has the base's operation on x."""
    op, offsets = use.op, use.offsets
    now = splicer.current.get(y, y)
    names = binding.method.asks(binding.names)
    extra = _operands(splicer, binding, names, stamp)
    if offsets is not None:
        extra[OFFSETS] = offsets
    function = _output_function(binding, use, names, tuple(extra))
    args = [x, now, *extra.values()]
    facts = _facts(binding, op, extra), use.first
    template = splicer.templates.get(function, facts, [value(node) for node in args])
    result, made = splicer.splice(template, args, now, stamp)
    redirect(now, result, keep=made)
    splicer.current[y] = result
    splicer.readers[op] += made


def _into_input(splicer: Splicer, binding: Binding, use: Use, stamp: Provenance) -> None:
    """Replaces what the site reads, for the base operation and all that stands beside it.

    What has been done to the input before belongs to the weight by now, and reads the new one, too: so does `fold`.
    """
    first, place = splicer.entries.get(use.op, (use.op, -1))
    x = use.x if place < 0 else first.all_input_nodes[place]
    names = binding.method.asks_input(binding.names)
    extra = _operands(splicer, binding, names, stamp)
    extra.pop(ROWS, None)

    def function(x: Tensor, *given: Tensor) -> Tensor:
        return binding.method.rewrite_input(binding.site, x, **dict(zip(extra, given, strict=True)))

    args = [x, *extra.values()]
    template = splicer.templates.get(function, _facts(binding, use.op, extra), [value(node) for node in args])
    computed = [node for node in args if node.op != "get_attr"]
    result, made = splicer.splice(template, args, max(computed), stamp, inside=use.op)
    for reader in (use.op, *splicer.readers[use.op]):
        reader.replace_input_with(x, result)
    splicer.readers[use.op] += made
    reader = next(node for node in made if x in node.all_input_nodes)
    splicer.entries[use.op] = reader, reader.all_input_nodes.index(x)


def _into_weight(splicer: Splicer, binding: Binding, site: Projection, stamp: Provenance) -> None:
    """What islands read for the weight, and for the bias, becomes what merging would make of it."""
    names = [site.weight, *filter(None, (site.bias,))]
    base = [splicer.operand(name) for name in names]
    now = [splicer.current.get(node, node) for node in base]
    state = {name: splicer.operand(path) for name, path in binding.names.items()}

    def function(weight: Tensor, *others: Tensor) -> Any:
        bias, given = (others[0], others[1:]) if site.bias else (None, others)
        changed = binding.method.fold(site, weight, bias, dict(zip(state, given, strict=True)))
        return changed if site.bias else changed[0]

    args = [*now, *state.values()]
    facts = "weight", of_method(binding.method, site, (*state, "bias" if site.bias else ""))
    template = splicer.templates.get(function, facts, [value(node) for node in args])
    result, _ = splicer.splice(template, args, min(site.within).prev, stamp, inside=min(site.within))
    for old, before, after in zip(base, now, result if site.bias else [result], strict=True):
        for reader in site.within:
            reader.replace_input_with(before, after)
        splicer.current[old] = after


def _operands(splicer: Splicer, binding: Binding, names: tuple[str, ...], stamp: Provenance) -> dict[str, fx.Node]:
    """The nodes of the state, weight and bias that a rewrite asks for; optional state may be absent."""
    site = binding.site
    paths = {name: binding.names[name] for name in names if name in binding.names}
    if isinstance(site, Projection):
        paths |= {"weight": site.weight} if "weight" in names else {}
        paths |= {"bias": site.bias} if "bias" in names and site.bias else {}
    nodes = {name: splicer.operand(paths[name]) for name in names if name in paths}
    if isinstance(site, Projection) and site.rows is not None and site.slice is None:
        nodes[ROWS] = splicer.index(f"{binding.path}.{ROWS}", site)
    nodes |= {WHICH: splicer.which(stamp)} if WHICH in names else {}
    return nodes | ({TRAINING: splicer.training()} if TRAINING in names else {})


def _output_function(
    binding: Binding, use: Use, names: tuple[str, ...], present: tuple[str, ...]
) -> Callable[..., Tensor]:
    """The method's rewrite on plain tensors: fused weights are narrowed to the site's rows and put back.

    Where the base multiplies by some rows of the site's weight alone, the method is given zeros for the rest.
    """
    method, site = binding.method, binding.site

    def function(x: Tensor, y: Tensor, *given: Tensor) -> Tensor:
        values: dict[str, Any] = dict(zip(present, given, strict=True))
        if not isinstance(site, Projection):
            whole: Tensor = method.rewrite(site, x, y, **{name: values.get(name) for name in names})
            return whole
        index = values.get(ROWS)
        if "weight" in values:
            values["weight"] = dense_weight(values["weight"], site, index)
        if "bias" in values:
            values["bias"] = take(values["bias"], site, -1, index)
        values[HERE] = Here(product=product_like(use.op, values.get(OFFSETS)))
        own = within(site, use)
        index = index if index is None or not use.first else index - use.first
        every = with_all_rows(y, own, use)
        part = take(every, own, -1, index)
        result = method.rewrite(site, x, part, **{name: values.get(name) for name in names})
        changed = put(every, result, own, index)
        return changed if every is y else changed.narrow(-1, use.first, y.shape[-1]).contiguous()

    return function


def _facts(binding: Binding, op: fx.Node, extra: dict[str, fx.Node]) -> object:
    """What the trace depends on."""
    entering = binding.method.rewrites_input(binding.site)
    return of_method(binding.method, binding.site, extra), entering, op.target
