"""What follows from numbers that are the same in every call is computed while a model is traced, and not in its graph.

A vision tower cuts its tokens by how many patches an image has, rows and columns: numbers that it reads off a tensor,
which a trace cannot. Where that tensor is a constant, so is all that is made of it and of other numbers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

MAKERS = (torch.arange, torch.tensor, torch.as_tensor, torch.zeros, torch.ones, torch.full, torch.linspace)


@contextmanager
def known(constants: Mapping[str, Any]) -> Iterator[None]:
    """Computes with real numbers what depends on none but `constants`, where there are tensors among them."""
    if not any(isinstance(value, Tensor) for value in constants.values()):
        yield
        return
    with _Known():
        yield


class _Known(TorchFunctionMode):
    """Runs an operation on nothing but real tensors outside of the modes that trace, or that take numbers away."""

    def __init__(self) -> None:
        super().__init__()
        self.traced: dict[int, Tensor] = {}  # real ones that the graph reads: they may not be written any more

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        real = [tensor for tensor in tensors if type(tensor) is Tensor and tensor.device.type != "meta"]
        plain = not any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in leaves)
        if plain and len(real) == len(tensors) and (tensors or _makes_numbers(func, kwargs)):
            if _writes(func) and tensors and id(tensors[0]) in self.traced:
                raise RuntimeError("a constant is written after it was used")
            with _disable_current_modes():
                return func(*args, **(kwargs or {}))
        self.traced |= {id(tensor): tensor for tensor in real}
        return func(*args, **(kwargs or {}))


def _makes_numbers(func: Callable[..., Any], kwargs: dict[str, Any] | None) -> bool:
    device = (kwargs or {}).get("device")
    return func in MAKERS and (device is None or torch.device(device).type != "meta")


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
