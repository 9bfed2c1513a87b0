"""The lengths of the rows of W + s B A in Triton: one launch, and of W + s B A never more than a tile at a time."""

from __future__ import annotations

import triton
from torch import Tensor
from triton import language as tl

from peftc.kernels.gpu.launch import HALVES, TRITON_DTYPES, on_device, precision
from peftc.kernels.gpu.lora_linear import rank_block

ROWS = 16


@triton.jit
def length_kernel(
    weight, a, b, lengths, scale, least, n_out, n_in, rank,
    ROWS: tl.constexpr, WIDE: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS lengths; weight is [n_out, n_in], a [rank, n_in], b [n_out, rank]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    squared = tl.zeros((ROWS,), tl.float32)
    for start in range(0, n_in, WIDE):
        column = start + tl.arange(0, WIDE)
        total = tl.zeros((ROWS, WIDE), tl.float32)
        for first in range(0, rank, RANK):
            r = first + tl.arange(0, RANK)
            mask = (row[:, None] < n_out) & (r[None, :] < rank)
            left = tl.load(b + row[:, None] * rank + r[None, :], mask=mask, other=0.0)
            mask = (r[:, None] < rank) & (column[None, :] < n_in)
            right = tl.load(a + r[:, None].to(tl.int64) * n_in + column[None, :], mask=mask, other=0.0)
            total = tl.dot(left, right, total, input_precision=PRECISION)
        inside = (row[:, None] < n_out) & (column[None, :] < n_in)
        own = tl.load(weight + row[:, None] * n_in + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total = own + scale * total
        squared += tl.sum(total * total, 1)
    tl.store(lengths + row, tl.sqrt(tl.maximum(squared, least)).to(lengths.dtype.element_ty), mask=row < n_out)


def forward(weight: Tensor, a: Tensor, b: Tensor, scale: float, least: float) -> Tensor:
    """As `peftc::row_lengths`."""
    if not {weight.dtype, a.dtype} <= set(TRITON_DTYPES):
        return NotImplemented
    (n_out, n_in), rank = weight.shape, a.shape[0]
    lengths = a.new_empty(n_out)
    with on_device(weight):
        length_kernel[(triton.cdiv(n_out, ROWS),)](
            weight.contiguous(), a.contiguous(), b.contiguous(), lengths, float(scale), float(least), n_out, n_in, rank,
            ROWS=ROWS, WIDE=128 if a.dtype in HALVES else 64, RANK=rank_block(rank, a.dtype),
            PRECISION=precision(a.dtype), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return lengths
