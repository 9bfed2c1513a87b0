"""Room for what lives only inside an operation: fresh pages of memory cost as much as writing them several times."""

from __future__ import annotations

import threading
from functools import lru_cache

import torch
from torch import Tensor

KEPT = 16  # rooms; none is larger than a piece of dropout's work


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A CPU tensor with whatever the last caller of this name and shape in this thread left in it.

    For small pieces of what an operation works on, never for what it returns.
    """
    return _room(name, shape, dtype, threading.get_ident())


@lru_cache(maxsize=KEPT)
def _room(name: str, shape: tuple[int, ...], dtype: torch.dtype, thread: int) -> Tensor:
    with torch.inference_mode(False):  # or nobody could write to it outside that mode
        return torch.empty(shape, dtype=dtype)
