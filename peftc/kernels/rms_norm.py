"""Root mean square normalisation over the last dimension, with or without a weight (Zhang & Sennrich 2019)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftc.kernels.common.operation import on_cuda, operation
from peftc.kernels.common.shapes import like, rows, wide


def reference(x: Tensor, weight: Tensor | None, eps: float, cast_first: bool) -> tuple[Tensor, Tensor]:
    """y = x / sqrt(mean(x²) + eps) * weight, and the reciprocal of the root; the mean in fp32 at least.

    Args:
        x: [..., d], of any dtype.
        weight: [d], or None for no product.
        eps: added to the mean square.
        cast_first: whether the normalised x is cast to x's dtype before the product with the weight, or after it.
    """
    wider = x.to(wide(x.dtype))
    rstd = torch.rsqrt(wider.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return (wider * rstd).to(x.dtype), rstd
    if cast_first:
        return weight * (wider * rstd).to(x.dtype), rstd
    return (wider * rstd * weight).to(x.dtype), rstd


@operation("rms_norm")
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, cast_first: bool) -> tuple[Tensor, Tensor]:
    """The same in three passes over x: its norm, two products in place."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = torch.mul(x, rstd, out=like(x, rstd.dtype))
    if cast_first:
        y = y.to(x.dtype)
    if weight is not None:
        y = y.mul_(weight) if y.dtype == torch.promote_types(y.dtype, weight.dtype) else y * weight
    return (y if cast_first else y.to(x.dtype)), rstd


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, cast_first: bool) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if weight is None or not cast_first else torch.promote_types(x.dtype, weight.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=wide(x.dtype))


@operation("rms_norm_backward")
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor) -> Tensor:
    """dx = rstd (h − x rstd² mean(h x)), where h = grad * weight."""
    wider = x.to(rstd.dtype)
    factor = 1.0 if weight is None else weight.to(rstd.dtype)
    h = torch.mul(grad.to(rstd.dtype), factor, out=like(x, rstd.dtype))
    cosine = (h * wider).sum(-1, keepdim=True).mul_(rstd.square()).div_(-x.shape[-1])
    return h.addcmul_(wider, cosine).mul_(rstd).to(x.dtype)


@rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@operation("rms_norm_weight_backward")
def rms_norm_weight_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """dweight = Σ over rows of grad x rstd."""
    product = grad.to(rstd.dtype) * x
    return torch.mm(rstd.reshape(1, -1), rows(product))[0].to(weight.dtype)


@rms_norm_weight_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
    if grad is None:
        return None, None, None, None
    x, weight, rstd = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    dx = torch.ops.peftc.rms_norm_backward(grad, x, weight, rstd) if needs_x else None
    dweight = torch.ops.peftc.rms_norm_weight_backward(grad, x, weight, rstd) if needs_weight else None
    return dx, dweight, None, None


rms_norm.register_autograd(_backward, setup_context=_save)

on_cuda(rms_norm, "rms_norm", "forward")
on_cuda(rms_norm_backward, "rms_norm", "backward")
on_cuda(rms_norm_weight_backward, "rms_norm", "weight_backward")
