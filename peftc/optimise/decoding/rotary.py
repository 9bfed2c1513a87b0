"""Rotary positions in three operations: x cos + [-x₂, x₁] sin is x cos + [x₂, x₁] [-sin₁, sin₂], signed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx


def signed(sine: Tensor) -> Tensor:
    """[-sin₁, sin₂]."""
    half = sine.shape[-1] // 2
    return torch.cat([-sine[..., :half], sine[..., half:]], -1)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x turned by its positions' angles, [..., width] each; `sine` is signed."""
    return torch.addcmul(x * cosine, torch.roll(x, x.shape[-1] // 2, -1), sine)


def turn_at_once(graph: fx.Graph) -> None:
    """Turns queries and keys each by itself: of few tokens, less is called so."""
    known: dict[fx.Node, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.peftc.rotary.default):
        xs: Any
        sine: Any
        xs, cosine, sine = node.args
        if sine not in known:
            with graph.inserting_after(sine):
                known[sine] = graph.call_function(signed, (sine,))
            known[sine].meta = dict(sine.meta)
        for item in list(node.users):
            item.target, item.args = rotated, (xs[item.args[1]], cosine, known[sine])
        graph.erase_node(node)
