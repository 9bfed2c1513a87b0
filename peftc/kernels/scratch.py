"""Room for what lives only inside an operation: fresh pages of memory cost as much as writing them several times."""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor


class _Rooms(threading.local):
    def __init__(self) -> None:
        self.known: dict[tuple[str, torch.dtype], Tensor] = {}


_ROOMS = _Rooms()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A CPU tensor with whatever numbers the last caller of this name left in it; one a thread, kept for the next.

    For small pieces of what an operation works on, never for what it returns.
    """
    count = prod(shape)
    room = _ROOMS.known.get((name, dtype))
    if room is None or room.numel() < count:
        with torch.inference_mode(False):  # or nobody could write to it outside that mode
            room = _ROOMS.known[name, dtype] = torch.empty(count, dtype=dtype)
    return room[:count].view(shape)
