"""Registers a kernel with torch, and knows the plain function behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import CustomOpDef, custom_op

_CPU: dict[str, Callable[..., Any]] = {}


def operation(name: str, device_types: str | Sequence[str] = "cpu") -> Callable[[Callable[..., object]], CustomOpDef]:
    """`torch.ops.peftc.<name>`: a functional operation, whose schema is read off the annotations."""

    def register(function: Callable[..., object]) -> CustomOpDef:
        _CPU[f"peftc::{name}"] = function
        return custom_op(f"peftc::{name}", function, mutates_args=(), device_types=device_types)

    return register


def cpu_function(op: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """What the dispatcher calls for `op` on CPU tensors below autograd, or None for operations of others.

    Behind a matrix product, with the caches cold, the way through the dispatcher and back costs about 0.1 ms on one
    core; who has real CPU tensors and needs no autograd can call the function itself.
    """
    return _CPU.get(op._schema.name)
