"""Keys and values that grow by a token at a time, in memory with room for those to come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

aten = torch.ops.aten

STEP = 32  # tokens that memory grows by at least where it is not known how many there will be
ROOM = "peftc_room"  # of a tensor that lies in such memory
EXPECTED = "peftc_expected"  # of a tensor without tokens: how many there will be


@dataclass
class Room:
    """Memory [batch, heads, capacity, width] whose first `used` tokens are there."""

    memory: Tensor
    used: int


def appended(past: Tensor, new: Tensor) -> Tensor:
    """[batch, heads, before, width] and [batch, heads, new, width] -> both; `past` itself stays as it is.

    Without a copy where `past` is what this returned last of the same memory: whoever holds what it returned earlier,
    or a part of it, gets memory of its own.
    """
    before, count = past.shape[2], new.shape[2]
    after = before + count
    room: Room | None = getattr(past, ROOM, None)
    if room is None or room.used != before or room.memory.shape[2] < after:
        batch, heads, _, width = new.shape
        expected = getattr(past, EXPECTED, 0)
        capacity = expected if expected >= after else after + max(STEP, after // 8)
        room = Room(new.new_empty(batch, heads, capacity, width), before)
        if before:
            room.memory.narrow(2, 0, before).copy_(past)
    room.memory.narrow(2, before, count).copy_(new)
    room.used = after
    result = room.memory.narrow(2, 0, after)
    setattr(result, ROOM, room)
    return result


def grow_in_place(graph: fx.Graph, past: tuple[str, ...]) -> None:
    """Appends to the inputs called `past` without copying them."""
    inputs = {node for node in graph.find_nodes(op="placeholder") if node.target in past}
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        pair = node.args[0]
        along = node.args[1] if len(node.args) > 1 else 0
        if isinstance(pair, list | tuple) and len(pair) == 2 and pair[0] in inputs and along in (2, -2):
            node.target, node.args, node.kwargs = appended, tuple(pair), {}
