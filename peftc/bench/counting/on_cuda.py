"""The ways that torch takes on CUDA alone: on the meta device, where a step is counted, it would take others.

Attention, dropout and RMSNorm are one kernel there.
"""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
ALIGNED = 16  # elements: the memory-efficient kernel reads a mask whose rows begin at multiples of it
WIDEST_HEAD = 256  # elements, of the flash kernel


class OnCuda(TorchFunctionMode):
    """While it is entered, these functions do what they do on a CUDA device. Not seen is what calls them from C++."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _WAYS.get(func, func)(*args, **(kwargs or {}))


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """As `F.scaled_dot_product_attention`: flash attention, or the memory-efficient kernel under a mask and in fp32."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    head = query.shape[-1]
    if attn_mask is None and half and head <= WIDEST_HEAD and value.shape[-1] == head:
        query, key, value = (F.pad(x, (0, -head % 8)) if head % 8 else x for x in (query, key, value))
        scale = head**-0.5 if scale is None else scale
        result = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return result[..., :head]  # type: ignore[no-any-return]
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    if attn_mask is not None:
        attn_mask = _bias(attn_mask, query, key)
    needs = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    result = aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs, dropout_p, is_causal, scale=scale
    )[0]
    return result  # type: ignore[no-any-return]


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as the kernel takes it: numbers to add, in rows that are aligned, expanded over batch and heads."""
    if mask.dtype is torch.bool:
        mask = torch.where(mask, 0.0, -inf).to(query.dtype)
    length = key.shape[-2]
    if length % ALIGNED:
        mask = F.pad(mask, (0, -length % ALIGNED))[..., :length]
    return mask.expand(*query.shape[:-2], query.shape[-2], length)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not 0 < p < 1 or inplace:
        return F.dropout(x, p, training, inplace)
    return torch.native_dropout(x, p, True)[0]


class _RMSNorm(torch.autograd.Function):
    """The kernel and its derivative, past the place where every device but CUDA takes them apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, rstd = aten._fused_rms_norm(x, shape, weight, eps)
        ctx.shape = shape
        ctx.save_for_backward(x, rstd, weight)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, rstd, weight = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        with torch._C._AutoDispatchBelowAutograd():
            dx, dweight = aten._fused_rms_norm_backward(gradient, x, ctx.shape, rstd, weight, needs)
        return dx, None, dweight, None


def _rms_norm(x: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    result: Tensor = _RMSNorm.apply(x, list(normalized_shape), weight, eps)  # type: ignore[no-untyped-call]
    return result


_WAYS: dict[Any, Any] = {
    F.scaled_dot_product_attention: attention,
    aten.scaled_dot_product_attention: attention,
    aten.scaled_dot_product_attention.default: attention,
    F.dropout: _dropout,
    torch.dropout: _dropout,
    aten.dropout: _dropout,
    aten.dropout.default: _dropout,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    aten.rms_norm: _rms_norm,
    aten.rms_norm.default: _rms_norm,
}
