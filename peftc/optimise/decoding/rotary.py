"""Rotary positions in three operations: x cos + [-x₂, x₁] sin is x cos + [x₂, x₁] [-sin₁, sin₂], signed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from peftc.graph.ir import value
from peftc.optimise.shorten import ENDLESS

aten = torch.ops.aten


def signed(sine: Tensor) -> Tensor:
    """[-sin₁, sin₂]."""
    half = sine.shape[-1] // 2
    return torch.cat([-sine[..., :half], sine[..., half:]], -1)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x turned by its positions' angles, [..., width] each; `sine` is signed."""
    return torch.addcmul(x * cosine, torch.roll(x, x.shape[-1] // 2, -1), sine)


def turn_at_once(graph: fx.Graph) -> None:
    """Finds the turns as models write them."""
    known: dict[fx.Node, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if (found := _turn(node)) is None:
            continue
        x, cosine, sine = found
        if sine not in known:
            with graph.inserting_after(sine):
                known[sine] = graph.call_function(signed, (sine,))
            known[sine].meta = dict(sine.meta)
        node.target, node.args, node.kwargs = rotated, (x, cosine, known[sine]), {}


def _turn(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """x, cos and sin of `x * cos + cat([-x₂, x₁]) * sin`."""
    terms = _operands(node, aten.add.Tensor)
    if terms is None:
        return None
    straight, turned = (_operands(part, aten.mul.Tensor) for part in terms)
    if straight is None or turned is None:
        return None
    (x, cosine), (halves, sine) = straight, turned
    parts, width = _operands(halves, aten.cat.default), value(x).shape[-1]
    if parts is None or parts[1] != -1 or len(parts[0]) != 2 or not isinstance(width, int) or width % 2:
        return None
    back, front = parts[0]
    behind = _operands(back, aten.neg.default)
    half = width // 2
    if (
        not _is_part(front, x, ((0, half),))
        or not behind
        or not _is_part(behind[0], x, ((half, ENDLESS), (half, width)))
    ):
        return None
    fits = all(value(part).shape[-1] == width and value(part).dtype == value(x).dtype for part in (cosine, sine))
    return (x, cosine, sine) if fits else None


def _operands(node: Any, target: Any) -> Any:
    """The operands of `node` where it is a plain call of `target`."""
    return node.args if isinstance(node, fx.Node) and node.target is target and not node.kwargs else None


def _is_part(node: Any, x: fx.Node, bounds: tuple[tuple[int, int], ...]) -> bool:
    """Whether `node` is a part of x along its last dimension."""
    given = _operands(node, aten.slice.Tensor)
    return bool(given) and given[0] is x and given[1] in (value(x).dim() - 1, -1) and tuple(given[2:]) in bounds
