"""What the operations' files share: tensors as matrices, and the precision that sums are kept in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a sum over values of `dtype` is kept in: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def rows(x: Tensor) -> Tensor:
    """[..., d] -> [rows, d], by a view where x's strides allow it."""
    return x.reshape(-1, x.shape[-1])


def like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room for a contiguous tensor of x's shape, whatever x's strides."""
    return x.new_empty(x.shape, dtype=dtype)
