"""Registers a kernel with torch, and knows the plain function behind it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._library.custom_ops import CustomOpDef
from torch.library import custom_op
from torch.utils import _pytree as pytree

from peftc.diagnostics.diagnostic import PeftcError
from peftc.kernels.common.errors import SecondDerivative

_CPU: dict[str, Callable[..., Any]] = {}
_CUDA: dict[str, Callable[..., Any]] = {}
_AUTOCAST = torch.library.Library("peftc", "IMPL")


def operation(
    name: str, device_types: str | Sequence[str] = "cpu", tags: Sequence[torch.Tag] = ()
) -> Callable[[Callable[..., object]], CustomOpDef]:
    """`torch.ops.peftc.<name>`: a functional operation, whose schema is read off the annotations."""

    def register(function: Callable[..., object]) -> CustomOpDef:
        _CPU[f"peftc::{name}"] = function
        if "cuda" in device_types:
            _CUDA[f"peftc::{name}"] = function
        made = custom_op(f"peftc::{name}", function, mutates_args=(), device_types=device_types, tags=tags)
        if name.endswith("_backward"):
            made.register_autograd(_refuse, setup_context=_refuse)  # the context is set up where a graph is asked for
        return made

    return register


def _refuse(*_: Any, **__: Any) -> None:
    raise PeftcError(SecondDerivative())


def first_derivative() -> None:
    """Called in a backward pass that has none itself.

    Raises:
        PeftcError: `second-derivative` with `create_graph=True`: what the pass reads of the forward pass would be taken
            for constant.
    """
    if torch.is_grad_enabled():
        _refuse()


def on_cuda(op: CustomOpDef, module: str, function: str) -> None:
    """On CUDA, `op` is a function of `peftc.kernels.gpu`, imported when it is first called.

    Where that returns NotImplemented (numbers or sizes that it does not know), the function for CPU tensors runs: it
    has to be ATen alone.
    """

    def run(*arguments: Any) -> Any:
        kernel = getattr(importlib.import_module(f"peftc.kernels.gpu.{module}"), function)
        result = kernel(*arguments)
        return _CPU[op._qualname](*arguments) if result is NotImplemented else result

    op.register_kernel("cuda", run)
    _CUDA[op._qualname] = run


def autocast_dtype(device: str) -> torch.dtype | None:
    """The precision of autocast on a type of device; None where it is off, or where there is none, as on `meta`."""
    known = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if known else None


def follow_autocast(op: CustomOpDef) -> None:
    """Under `torch.autocast`, `op` gets its numbers in autocast's precision, as products do; float64 stays."""
    for key, device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        _AUTOCAST.impl(op._opoverload, partial(_in_its_precision, op._opoverload, device, keys), key)


def _in_its_precision(op: Any, device: str, keys: Any, *arguments: Any) -> Any:
    dtype = torch.get_autocast_dtype(device)

    def narrowed(given: Any) -> Any:
        casts = isinstance(given, Tensor) and given.is_floating_point() and given.dtype is not torch.float64
        return given.to(dtype) if casts else given

    with torch._C._ExcludeDispatchKeyGuard(keys):
        return op(*pytree.tree_map(narrowed, arguments))


def runs(name: str, function: Callable[..., Any]) -> None:
    """Says what an operation, registered elsewhere, runs on CPU tensors below autograd."""
    _CPU[name] = function


def cpu_function(op: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """What the dispatcher calls for `op` on CPU tensors below autograd, or None for operations of others.

    Behind a matrix product, with the caches cold, the way through the dispatcher and back costs about 0.1 ms on one
    core; who has real CPU tensors and needs no autograd can call the function itself.
    """
    return _CPU.get(op._schema.name)


def cuda_function(op: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """What the dispatcher calls for `op` on CUDA tensors below autograd, or None for operations of others."""
    return _CUDA.get(op._schema.name)


def call_directly(graph: fx.Graph) -> None:
    """Has a graph that runs on CPU tensors, below autograd and outside of any trace, call the functions themselves."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            node.target = cpu_function(node.target) or node.target
