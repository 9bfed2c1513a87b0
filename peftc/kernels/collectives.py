"""What the processes of a tensor-parallel model send one another, each a function with a gradient.

Behind `shared` each process computes with its part of the weights, before `summed` each has its part of the sum:
conjugates of one another (Shoeybi et al. 2019, arXiv:1909.08053, f and g).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from peftc.kernels.common.operation import first_derivative, operation

# Element by element, as those see it who look for the projections around them.
POINTWISE = (torch.Tag.pointwise,)


@operation("shared", device_types=["cpu", "cuda"], tags=POINTWISE)
def shared(x: Tensor, group: str) -> Tensor:
    """x, the same on all processes of `group`; its gradient is the sum of theirs."""
    return x.clone()


@shared.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


@operation("summed", device_types=["cpu", "cuda"], tags=POINTWISE)
def summed(x: Tensor, group: str) -> Tensor:
    """The sum of the x of all processes of `group`; the gradient of each is that of the sum."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_resolve_process_group(group))  # type: ignore[arg-type]
    return total


@summed.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _group(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[1]


def _sum(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    first_derivative()
    return summed(grad, ctx.group), None


def _same(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


shared.register_autograd(_sum, setup_context=_group)
summed.register_autograd(_same, setup_context=_group)
