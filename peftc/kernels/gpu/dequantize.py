"""Four-bit codes -> dense weights in Triton: levels[code] times the scale of the code's block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton import language as tl

from peftc.kernels.gpu.launch import on_device

BLOCK = 512
NESTED_BLOCK = tl.constexpr(256)


@triton.jit
def dequantize_kernel(
    packed, absmax, levels, dynamic, nested_absmax, offset, result, count, block,
    NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = 2 * byte < count
    codes = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
    group = 2 * byte // block  # blocks are even: both codes of a byte are of one
    scale = tl.load(absmax + group, mask=inside, other=0)
    if NESTED:
        outer = tl.load(nested_absmax + group // NESTED_BLOCK, mask=inside, other=0.0)
        product = tl.load(dynamic + scale.to(tl.int32), mask=inside, other=0.0) * outer
        scale = product + tl.load(offset)
    high = tl.load(levels + (codes >> 4)) * scale
    low = tl.load(levels + (codes & 15)) * scale
    index = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    both = tl.interleave(high, low)
    tl.store(result + index, both.to(result.dtype.element_ty), mask=index < count)


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None, levels: Tensor,
    dynamic: Tensor, block: int, shape: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `peftc::dequantize_4bit`, with the tables themselves.

    Args:
        packed: uint8, two codes each, the first in the high bits.
        absmax: fp32, or uint8 where it is quantised itself.
        nested_absmax, offset: the scales of absmax (one for 256) and what is added to it, or None.
        levels: fp32 [16], by code.
        dynamic: fp32 [256], what the bytes of a quantised absmax stand for.
        block: how many numbers have a scale in common; even.
        shape, dtype: of the result.
    """
    result = packed.new_empty(shape, dtype=dtype)
    nested = nested_absmax is not None
    if result.numel():
        with on_device(packed):
            dequantize_kernel[(triton.cdiv(packed.numel(), BLOCK),)](
                packed, absmax, levels, dynamic, nested_absmax if nested else levels,
                offset if offset is not None else levels, result, result.numel(), block,
                NESTED=nested, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,  # rounded as bitsandbytes rounds
            )  # fmt: skip
    return result
