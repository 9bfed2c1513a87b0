"""RMSNorm in Triton: a row a program forward, some rows a program backward, so that dweight needs few partial sums."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from peftc.kernels.common.shapes import like, rows, wide
from peftc.kernels.gpu.launch import TRITON_DTYPES, on_device, power_of_two

WIDEST = 16384
PARTIAL_SUMS = 512


@triton.jit
def forward_kernel(x, weight, y, rstd, d, eps, WEIGHTED: tl.constexpr, CAST_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    values = tl.load(x + row * d + columns, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(values * values, 0) / d + eps)
    tl.store(rstd + row, r)
    values = values * r
    if CAST_FIRST:
        values = values.to(x.dtype.element_ty).to(tl.float32)
    if WEIGHTED:
        values = values * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * d + columns, values.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad, x, weight, rstd, dx, partial, count, d, height,
    WEIGHTED: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * height
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    total = tl.zeros((BLOCK,), tl.float32)
    factor = tl.full((BLOCK,), 1.0, tl.float32)
    if WEIGHTED:
        factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    for i in range(height):
        row = (first + i).to(tl.int64)
        here = columns < tl.where(row < count, d, 0)
        values = tl.load(x + row * d + columns, mask=here, other=0.0).to(tl.float32)
        dy = tl.load(grad + row * d + columns, mask=here, other=0.0).to(tl.float32)
        r = tl.load(rstd + tl.minimum(row, count - 1))
        if NEEDS_X:
            h = dy * factor
            mean = tl.sum(h * values, 0) / d
            result = r * (h - values * (r * r * mean))
            tl.store(dx + row * d + columns, result.to(dx.dtype.element_ty), mask=here)
        if NEEDS_WEIGHT:
            total += dy * values * r
    if NEEDS_WEIGHT:
        tl.store(partial + tl.program_id(0).to(tl.int64) * d + columns, total, mask=inside)


def _known(x: Tensor) -> bool:
    return x.dtype in TRITON_DTYPES and x.shape[-1] <= WIDEST


def _warps(block: int) -> int:
    return power_of_two(block // 512, 2, 16)


def forward(x: Tensor, weight: Tensor | None, eps: float, cast_first: bool) -> tuple[Tensor, Tensor]:
    """As `peftc::rms_norm`."""
    d = x.shape[-1]
    if not _known(x):
        return NotImplemented
    x = x.contiguous()
    dtype = x.dtype if weight is None or not cast_first else torch.promote_types(x.dtype, weight.dtype)
    y, rstd = like(x, dtype), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    block = int(triton.next_power_of_2(d))
    if x.numel():
        with on_device(x):
            forward_kernel[(x.numel() // d,)](
                x, x if weight is None else weight.contiguous(), y, rstd, d, eps,
                WEIGHTED=weight is not None, CAST_FIRST=cast_first, BLOCK=block,
                num_warps=_warps(block), enable_fp_fusion=True,
            )  # fmt: skip
    return y, rstd


def backward(grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor) -> Tensor:
    """As `peftc::rms_norm_backward`."""
    if not _known(x):
        return NotImplemented
    dx, _ = _backward(grad, x, weight, rstd, True, False)
    return dx


def weight_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """As `peftc::rms_norm_weight_backward`."""
    if not _known(x):
        return NotImplemented
    _, partial = _backward(grad, x, weight, rstd, False, True)
    return partial.sum(0).to(weight.dtype)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """dx as x and partial sums of dweight [programs, d]; what is not needed is not written."""
    d, count = x.shape[-1], rows(x).shape[0]
    grad, x = grad.contiguous(), x.contiguous()
    programs = max(1, min(PARTIAL_SUMS, count))
    height = triton.cdiv(count, programs)
    block = int(triton.next_power_of_2(d))
    dx = like(x) if needs_x else x
    partial = x.new_zeros((programs if needs_weight else 0, d), dtype=wide(x.dtype))
    with on_device(x):
        backward_kernel[(programs,)](
            grad, x, x if weight is None else weight.contiguous(), rstd, dx, partial if needs_weight else rstd,
            count, d, height, WEIGHTED=weight is not None, NEEDS_X=needs_x, NEEDS_WEIGHT=needs_weight,
            BLOCK=block, num_warps=_warps(block), enable_fp_fusion=True,
        )  # fmt: skip
    return dx, partial
