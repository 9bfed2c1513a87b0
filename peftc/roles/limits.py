"""How long a sequence may be: the size of the table that positions are looked up in, less what they start at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from peftc.graph.ir import get_attribute, is_tensor, value

aten = torch.ops.aten

COUNTERS = {
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.cumsum.default,
}  # fmt: skip
SHORT = 2  # tokens of the input that the first positions are read off


def position_limit(module: fx.GraphModule, inputs: dict[str, fx.Node], tokens: str, filler: int) -> int | None:
    """The longest sequence there are positions for; None where positions are computed and not looked up."""
    length = value(inputs[tokens]).shape[1]
    limits = [
        _room(module, lookup, _short_inputs(inputs, tokens, filler))
        for lookup in module.graph.find_nodes(op="call_function", target=aten.embedding.default)
        if _looks_up_positions(module, lookup, str(length))
    ]
    return min(limits, default=None)


def _looks_up_positions(module: fx.GraphModule, lookup: fx.Node, length: str) -> bool:
    """Whether the index counts: along the sequence alone, from a range, a running sum, or a table of positions."""
    table, index = lookup.args[:2]
    if not isinstance(table, fx.Node) or not isinstance(index, fx.Node) or not is_tensor(index):
        return False
    if [str(size) for size in value(index).shape].count(length) != 1:
        return False
    rows = int(value(table).shape[0])
    return any(
        node.target in COUNTERS or node.target == "position_ids" or (node.op == "get_attr" and _is_range(node, rows))
        for node in _ancestors(index)
    )


def _is_range(node: fx.Node, rows: int) -> bool:
    return is_tensor(node) and not value(node).is_floating_point() and value(node).shape[-1:] == (rows,)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen, queue = {node}, [node]
    while queue:
        for other in queue.pop().all_input_nodes:
            if other not in seen and (is_tensor(other) or other.op == "get_attr"):
                seen.add(other)
                queue.append(other)
    return seen


def _short_inputs(inputs: dict[str, fx.Node], tokens: str, filler: int) -> dict[str, Tensor]:
    """A row of two tokens, all of them there."""
    short = {name: torch.ones(1, SHORT, dtype=torch.long) for name in inputs}
    return short | {tokens: torch.full((1, SHORT), filler), "position_ids": torch.arange(SHORT)[None]}


def _room(module: fx.GraphModule, lookup: fx.Node, inputs: dict[str, Tensor]) -> int:
    """Rows of the table from the first position on: some models start at 2."""
    table, index = lookup.args[:2]
    assert isinstance(table, fx.Node)
    assert isinstance(index, fx.Node)
    last = int(_computed(module, index, inputs, {}).max())
    return int(value(table).shape[0]) - (last - (SHORT - 1))


def _computed(module: fx.GraphModule, node: fx.Node, inputs: dict[str, Tensor], known: dict[fx.Node, Any]) -> Any:
    """The value of `node` on real inputs, on the CPU: a walk over the few nodes that positions are made by."""
    if node not in known:
        if node.op == "placeholder":
            known[node] = inputs[str(node.target)]
        elif node.op == "get_attr":
            known[node] = _stored(get_attribute(module, str(node.target)))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda other: _computed(module, other, inputs, known))
            args, kwargs = fx.node.map_aggregate((args, kwargs), _on_cpu)
            assert callable(node.target)
            known[node] = node.target(*args, **kwargs)
    return known[node]


def _stored(tensor: Tensor) -> Tensor:
    """A buffer; without data, it is the range that it can only be."""
    if tensor.is_meta:
        return torch.arange(tensor.shape[-1]).expand(tensor.shape)
    return tensor.cpu()


def _on_cpu(item: Any) -> Any:
    return torch.device("cpu") if isinstance(item, torch.device) else item
