"""Ways that a model's code takes in eager mode alone, though the graph of a capture may have them, too.

transformers' chunked delta rules solve a triangular system in eager mode. Where they are exported they spell it out, a
row after the other, for runtimes without such an operation: some hundred operations a layer more. This graph is run by
torch, which has it.

A module that is moved within a forward to where it is already (the router of Switch Transformers) stays what it is: its
parameters, which a trace holds, cannot be set anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.exporters.utils import patch_attributes

ASKS = "is_torchdynamo_exporting"
# What code that asks has another way for, and a captured graph need not.
KNOWN_HERE = frozenset({"solve_triangular"})


@contextmanager
def as_in_eager_mode(model: nn.Module) -> Iterator[None]:
    """While it is open, a function of a model's code that uses what is `KNOWN_HERE` is told that it is not exported."""
    names = dict.fromkeys(type(part).__module__ for part in model.modules())
    asking = [module for name in names if hasattr(module := sys.modules.get(name), ASKS)]
    ways: list[tuple[Any, str, Callable[..., Any]]] = [(module, ASKS, _told) for module in asking]
    with patch_attributes([*ways, (nn.Module, "_apply", _where_it_is)]):
        yield


def _where_it_is(own: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def apply(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        held = [*module.parameters(recurse), *module.buffers(recurse)]
        return module if all(change(tensor) is tensor for tensor in held) else own(module, change, recurse)

    return apply


def _told(own: Callable[[], bool]) -> Callable[[], bool]:
    def asks() -> bool:
        uses: Any = sys._getframe(1).f_code.co_names
        return KNOWN_HERE.isdisjoint(uses) and own()

    return asks
