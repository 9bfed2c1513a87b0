"""Keys and values that several heads of queries share, found behind their copies for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from peftc.graph.ir import expression, is_tensor, value

aten = torch.ops.aten


def shared(operand: fx.Node) -> fx.Node | None:
    """[batch, shared, tokens, width] of which `operand` has each head several times in a row."""
    steps = list(_up(operand))
    kinds = [step.target for step in steps]
    if kinds[:3] != [aten.reshape.default, aten.expand.default, aten.unsqueeze.default]:
        return None
    wide, alone = steps[1], steps[2]
    source = alone.args[0]
    assert isinstance(source, fx.Node)
    expanded = [expression(size) for size in value(wide).shape]
    own = [expression(size) for size in value(source).shape]
    result = [expression(size) for size in value(operand).shape]
    if len(own) != 4 or len(expanded) != 5 or alone.args[1] not in (2, -3):
        return None
    fits = [expanded[0], expanded[1], *expanded[3:]] == own and result == [own[0], own[1] * expanded[2], *own[2:]]
    return source if fits else None


def shared_by_both(keys: fx.Node, values: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Both operands of one attention before their copies; None where they are not shared, or not alike."""
    k, v = shared(keys), shared(values)
    if k is None or v is None or expression(value(k).shape[1]) != expression(value(v).shape[1]):
        return None
    return k, v


def _up(node: fx.Node) -> Iterator[fx.Node]:
    while node.op == "call_function" and is_tensor(node):
        yield node
        source: Any = node.args[0]
        if not isinstance(source, fx.Node):
            return
        node = source
