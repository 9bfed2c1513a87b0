"""Attention of several texts in a row by PyTorch's own kernel for CUDA, which takes their bounds.

It is called below `torch.nn.attention.varlen.varlen_attn`, whose two passes autograd would tie together itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

WIDEST = 256


def forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, counts: Tensor, scale: float, causal: bool, window: int | None
) -> Any:
    """The forward pass; NotImplemented where the kernel does not take such operands."""
    if not _takes(q, v):
        return NotImplemented
    bounded, options = _bounds(bounds, counts), _options(scale, causal, window)
    y, lse, _ = torch.ops.torch_attn._varlen_attn(
        *map(_tokens, (q, k, v)), *bounded, enable_gqa=q.shape[1] != k.shape[1], **options
    )
    batch, heads, length, _ = q.shape
    return _heads(y, batch), lse.view(heads, batch, length).transpose(0, 1).contiguous()


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, bounds: Tensor, counts: Tensor,
    scale: float, causal: bool, window: int | None,
) -> Any:  # fmt: skip
    """The backward pass; NotImplemented where the kernel does not take such operands."""
    if not _takes(q, v):
        return NotImplemented
    bounded, options = _bounds(bounds, counts), _options(scale, causal, window)
    total = lse.transpose(0, 1).reshape(q.shape[1], -1)
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that there is none of
    found = torch.ops.torch_attn._varlen_attn_backward(
        *map(_tokens, (grad, q, k, v, y)), total, *bounded, rng_state=unused, **options
    )
    return tuple(_heads(item, q.shape[0]) for item in found)


def _takes(q: Tensor, v: Tensor) -> bool:
    width = q.shape[-1]
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and width == v.shape[-1]
        and width <= WIDEST
        and width % 8 == 0
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and hasattr(varlen, "varlen_attn")
    )


def _bounds(bounds: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, int, int]:
    count, longest = counts.tolist()
    ends = bounds[: count + 1]
    return ends, ends, longest, longest


def _options(scale: float, causal: bool, window: int | None) -> dict[str, Any]:
    sides = [-1, 0 if causal else -1] if window is None else [window - 1, 0]
    return {"is_causal": causal and window is None, "scale": scale, "window_size": sides}


def _tokens(operand: Tensor) -> Tensor:
    """[batch, heads, tokens, width] -> [batch * tokens, heads, width]."""
    return operand.transpose(1, 2).flatten(0, 1)


def _heads(operand: Tensor, batch: int) -> Tensor:
    return operand.unflatten(0, (batch, -1)).transpose(1, 2)
