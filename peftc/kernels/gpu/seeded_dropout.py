"""Seeded dropout in Triton: one pass, no mask."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from peftc.kernels.gpu.launch import on_device
from peftc.kernels.gpu.random_bits import keeps, word_keys
from peftc.kernels.seeded_dropout import dropped_levels, kept_scale

BLOCK = 1024


@triton.jit(do_not_specialize=["salt"])
def dropout_kernel(x, y, seed, salt, count, threshold, factor, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    first, second = word_keys(seed, salt)
    values = tl.load(x + index, mask=inside, other=0.0)
    if x.dtype.element_ty != tl.float64:
        values = values.to(tl.float32)
    values = tl.where(keeps(index, first, second, threshold), values * factor, 0.0)
    tl.store(y + index, values.to(y.dtype.element_ty), mask=inside)


def seeded_dropout(x: Tensor, seed: Tensor, p: float, salt: int) -> Tensor:
    """As `peftc::seeded_dropout`."""
    x = x.contiguous()
    y = torch.empty_like(x)
    with on_device(x):
        grid = (triton.cdiv(x.numel(), BLOCK),)
        if x.numel():
            dropout_kernel[grid](
                x,
                y,
                seed,
                salt,
                x.numel(),
                dropped_levels(p),
                kept_scale(p),
                BLOCK=BLOCK,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return y
