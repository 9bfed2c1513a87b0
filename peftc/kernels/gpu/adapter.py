"""A bottleneck adapter in Triton: down, activation, up and residual in one kernel, if the bottleneck fits a program."""

from __future__ import annotations

import triton
from torch import Tensor
from triton import language as tl

from peftc.kernels.common.activations import check
from peftc.kernels.common.shapes import like, rows
from peftc.kernels.gpu.gated_activation import activate
from peftc.kernels.gpu.launch import TRITON_DTYPES, on_device, power_of_two, precision

WIDEST = 128


@triton.jit
def adapter_kernel(
    x, residual, down, down_bias, up, up_bias, y, z, scale, count, n_in, n_out, width,
    DOWN_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, n_in, DEPTH):
        k = start + tl.arange(0, DEPTH)
        mask = (row[:, None] < count) & (k[None, :] < n_in)
        values = tl.load(x + row[:, None] * n_in + k[None, :], mask=mask, other=0.0).to(down.dtype.element_ty)
        mask = (k[:, None] < n_in) & (inner[None, :] < width)
        matrix = tl.load(down + inner[None, :] * n_in + k[:, None], mask=mask, other=0.0)
        total = tl.dot(values, matrix, total, input_precision=PRECISION)
    if DOWN_BIAS:
        total += tl.load(down_bias + inner, mask=inner < width, other=0.0).to(tl.float32)[None, :]
    narrow = total.to(z.dtype.element_ty)
    tl.store(z + row[:, None] * width + inner[None, :], narrow, mask=(row[:, None] < count) & (inner[None, :] < width))
    value, _ = activate(narrow.to(tl.float32), ACTIVATION)
    value = tl.where(inner[None, :] < width, value, 0.0).to(up.dtype.element_ty)
    for start in range(0, n_out, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = (inner[:, None] < width) & (column[None, :] < n_out)
        matrix = tl.load(up + column[None, :] * width + inner[:, None], mask=mask, other=0.0)
        branch = tl.dot(value, matrix, input_precision=PRECISION)
        if UP_BIAS:
            branch += tl.load(up_bias + column, mask=column < n_out, other=0.0).to(tl.float32)[None, :]
        inside = (row[:, None] < count) & (column[None, :] < n_out)
        index = row[:, None] * n_out + column[None, :]
        result = tl.load(residual + index, mask=inside, other=0.0).to(tl.float32) + scale * branch
        tl.store(y + index, result.to(y.dtype.element_ty), mask=inside)


def forward(
    x: Tensor, residual: Tensor | None, down: Tensor, down_bias: Tensor | None, up: Tensor, up_bias: Tensor | None,
    scale: float, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `peftc::adapter`."""
    check(activation)
    width = down.shape[0]
    if not {x.dtype, down.dtype} <= set(TRITON_DTYPES) or width > WIDEST:
        return NotImplemented
    flat = rows(x).contiguous()
    base = flat if residual is None else rows(residual).contiguous()
    y, z = like(x if residual is None else residual), x.new_empty((*x.shape[:-1], width), dtype=down.dtype)
    count = flat.shape[0]
    height = power_of_two(count, 16, 32)
    if count:
        with on_device(x):
            adapter_kernel[(triton.cdiv(count, height),)](
                flat, base, down.contiguous(), down if down_bias is None else down_bias, up.contiguous(),
                up if up_bias is None else up_bias, y, z, float(scale), count, flat.shape[1], up.shape[0], width,
                DOWN_BIAS=down_bias is not None, UP_BIAS=up_bias is not None, ACTIVATION=activation, ROWS=height,
                WIDTH=power_of_two(width, 16, WIDEST), DEPTH=32, COLUMNS=64, PRECISION=precision(down.dtype),
                num_warps=4, enable_fp_fusion=True,
                num_stages=2,
            )  # fmt: skip
    return y, z
