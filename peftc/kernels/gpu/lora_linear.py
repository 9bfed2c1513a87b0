"""LoRA linears in Triton: one launch for a group of weights, the low-rank product in the accumulator.

The accumulator starts as scale * S Bᵀ; the base's product is summed on top of it, so the branch costs no registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton import language as tl

from peftc.kernels.common.shapes import rows
from peftc.kernels.gpu.launch import HALVES, TRITON_DTYPES, on_device, power_of_two, precision, product_tile
from peftc.kernels.gpu.random_bits import keeps, word_keys
from peftc.kernels.seeded_dropout import dropped_levels, kept_scale

GROUP = 4  # weights a launch
SWIZZLE = tl.constexpr(8)  # rows of tiles that go through the columns together: their weights stay in the cache


@triton.jit(do_not_specialize=["salt"])
def hidden_kernel(
    x, a, hidden, seed, salt, threshold, factor, count, n_in, rank,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S = dropout(x) Aᵀ, ROWS by RANK of it; x is [count, n_in], a [rank, n_in]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * RANK + tl.arange(0, RANK)
    depth = tl.arange(0, DEPTH)
    first, second = 0, 0
    if DROPOUT:
        first, second = word_keys(seed, salt)
    total = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(0, n_in, DEPTH):
        k = start + depth
        index = row[:, None] * n_in + k[None, :]
        inside = (row[:, None] < count) & (k[None, :] < n_in)
        values = tl.load(x + index, mask=inside, other=0.0).to(a.dtype.element_ty)
        if DROPOUT:
            values = tl.where(keeps(index, first, second, threshold), values, 0.0)
        mask = (k[:, None] < n_in) & (column[None, :] < rank)
        matrix = tl.load(a + column[None, :] * n_in + k[:, None], mask=mask, other=0.0)
        total = tl.dot(values, matrix, total, input_precision=PRECISION)
    inside = (row[:, None] < count) & (column[None, :] < rank)
    place = hidden + row[:, None] * rank + column[None, :]
    tl.store(place, (total * factor).to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def linear_kernel(
    x, hidden, w0, w1, w2, w3, b0, b1, b2, b3, c0, c1, c2, c3, l0, l1, l2, l3, y0, y1, y2, y3,
    s0, s1, s2, s3, n0, n1, n2, n3, r0, r1, r2, r3, count, n_in, all_ranks,
    MEMBERS: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr, SMALLEST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS by COLUMNS of y_i = length_i * (x W_iᵀ + s_i S_i B_iᵀ) + bias_i, for the member i that the program is of.

    RANK 0: there are no S_i and B_i. SMALLEST: the bias is scaled, too, and a length nearer to 0 than this is this.
    """
    program = tl.program_id(0)
    high = tl.cdiv(count, ROWS)
    w, b, c, length, y, scale, n, rank, first, begin = w0, b0, c0, l0, y0, s0, n0, r0, 0, 0
    if MEMBERS > 1:
        end = high * tl.cdiv(n0, COLUMNS)
        if program >= end:
            w, b, c, length, y, scale, n, rank, first, begin = w1, b1, c1, l1, y1, s1, n1, r1, r0, end
    if MEMBERS > 2:
        end += high * tl.cdiv(n1, COLUMNS)
        if program >= end:
            w, b, c, length, y, scale, n, rank, first, begin = w2, b2, c2, l2, y2, s2, n2, r2, r0 + r1, end
    if MEMBERS > 3:
        end += high * tl.cdiv(n2, COLUMNS)
        if program >= end:
            w, b, c, length, y, scale, n, rank, first, begin = w3, b3, c3, l3, y3, s3, n3, r3, r0 + r1 + r2, end
    across = tl.cdiv(n, COLUMNS)
    local = program - begin
    band = local // (SWIZZLE * across)
    thick = min(high - band * SWIZZLE, SWIZZLE)
    within = local - band * SWIZZLE * across
    row = (band * SWIZZLE + within % thick).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (within // thick) * COLUMNS + tl.arange(0, COLUMNS)

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if RANK > 0:
        for start in range(0, rank, RANK):
            r = start + tl.arange(0, RANK)
            mask = (row[:, None] < count) & (r[None, :] < rank)
            narrow = tl.load(hidden + row[:, None] * all_ranks + (first + r)[None, :], mask=mask, other=0.0)
            mask = (r[:, None] < rank) & (column[None, :] < n)
            factor = tl.load(b + column[None, :].to(tl.int64) * rank + r[:, None], mask=mask, other=0.0)
            total = tl.dot(narrow, factor, total, input_precision=PRECISION)
        total *= scale

    depth = tl.arange(0, DEPTH)
    for start in range(0, n_in, DEPTH):
        k = start + depth
        mask = (row[:, None] < count) & (k[None, :] < n_in)
        values = tl.load(x + row[:, None] * n_in + k[None, :], mask=mask, other=0.0)
        mask = (k[:, None] < n_in) & (column[None, :] < n)
        if TRANSPOSED:
            place = w + k[:, None].to(tl.int64) * n + column[None, :]
        else:
            place = w + column[None, :].to(tl.int64) * n_in + k[:, None]
        total = tl.dot(values, tl.load(place, mask=mask, other=0.0), total, input_precision=PRECISION)

    if SMALLEST > 0:
        factor = tl.load(length + column, mask=column < n, other=0.0).to(tl.float32)
        factor = tl.where(tl.abs(factor) < SMALLEST, SMALLEST, factor)
        if BIAS:
            total = total + tl.load(c + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
        total = total * factor[None, :]
    else:
        if LENGTH:
            total = total * tl.load(length + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
        if BIAS:
            total = total + tl.load(c + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    inside = (row[:, None] < count) & (column[None, :] < n)
    tl.store(y + row[:, None] * n + column[None, :], total.to(y.dtype.element_ty), mask=inside)


def rank_block(rank: int, dtype: torch.dtype) -> int:
    """How many ranks are worked on at a time: `tl.dot` wants 16 at least, and more than these spill."""
    return power_of_two(rank, 16, 64 if dtype in HALVES else 32)


def hidden_states(x: Tensor, a: Tensor, seed: Tensor | None, p: float, salt: int) -> Tensor:
    """S = dropout(x) Aᵀ [rows, r]."""
    count, n_in = x.shape
    hidden = x.new_empty(count, a.shape[0], dtype=a.dtype)
    dropping = seed is not None and dropped_levels(p) > 0
    height, width = power_of_two(count, 16, 64), rank_block(a.shape[0], a.dtype)
    if count:
        hidden_kernel[(triton.cdiv(count, height), triton.cdiv(a.shape[0], width))](
            x, a, hidden, x if seed is None else seed, salt, dropped_levels(p), kept_scale(p) if dropping else 1.0,
            count, n_in, a.shape[0], DROPOUT=dropping, ROWS=height, RANK=width, DEPTH=rank_block(64, a.dtype),
            PRECISION=precision(a.dtype), num_warps=4, enable_fp_fusion=True, num_stages=2,
        )  # fmt: skip
    return hidden


def forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor],
    scales: Sequence[float], transposed: bool, seed: Tensor | None, p: float, salt: int,
) -> list[Tensor]:  # fmt: skip
    """As `peftc::lora_linear`."""
    return _forward(x, weights, biases, a, b, None, scales, transposed, seed, p, salt)


def dora_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor],
    lengths: Sequence[Tensor], scales: Sequence[float], transposed: bool, seed: Tensor | None, p: float, salt: int,
) -> list[Tensor]:  # fmt: skip
    """As `peftc::dora_linear`."""
    return _forward(x, weights, biases, a, b, lengths, scales, transposed, seed, p, salt)


def _forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor],
    lengths: Sequence[Tensor] | None, scales: Sequence[float], transposed: bool, seed: Tensor | None, p: float,
    salt: int,
) -> list[Tensor]:  # fmt: skip
    ranks = [A.shape[0] for A in a]
    if not {x.dtype, a[0].dtype} <= set(TRITON_DTYPES):
        return NotImplemented
    flat = rows(x).contiguous()
    with on_device(x):
        hidden = hidden_states(flat, torch.cat(list(a)), seed, p, salt)
        outputs: list[Tensor] = []
        for start in range(0, len(a), GROUP):
            part = slice(start, start + GROUP)
            some = biases[part] if biases else [None] * len(weights[part])
            outputs += grouped(
                flat, hidden[:, sum(ranks[:start]) :], weights[part], some, b[part],
                None if lengths is None else lengths[part], scales[part], transposed,
            )  # fmt: skip
    return [y.view(*x.shape[:-1], y.shape[1]) for y in (*outputs, hidden)]


def grouped(
    x: Tensor, hidden: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor | None], b: Sequence[Tensor],
    lengths: Sequence[Tensor] | None, scales: Sequence[float], transposed: bool, smallest: float = 0.0,
) -> list[Tensor]:  # fmt: skip
    """The outputs of at most GROUP weights in one launch.

    Without `hidden`, b and scales there are no branches. With `smallest`, lengths are no nearer to 0 than that, and
    are multiplied behind the biases instead of before them.
    """
    count, n_in = x.shape
    members = len(weights)
    biased = any(bias is not None for bias in biases)
    widths = [weight.shape[transposed] for weight in weights]
    outputs = [x.new_empty(count, n) for n in widths]
    added = outputs
    if biased:
        added = [y.new_zeros(n) if bias is None else bias for bias, y, n in zip(biases, outputs, widths, strict=True)]
    tile = product_tile(x.dtype, count)
    programs = triton.cdiv(count, tile.rows) * sum(triton.cdiv(n, tile.columns) for n in widths)
    if not programs:
        return outputs

    def filled(values: Sequence[object]) -> list[object]:
        return [*values, *[values[0]] * (GROUP - len(values))]

    linear_kernel[(programs,)](
        x, x if hidden is None else hidden, *filled([weight.contiguous() for weight in weights]),
        *filled([B.contiguous() for B in b] or [x]), *filled(added), *filled(outputs if lengths is None else lengths),
        *filled(outputs), *filled([float(scale) for scale in scales] or [1.0]), *filled(widths),
        *filled([B.shape[1] for B in b] or [0]), count, n_in, 0 if hidden is None else hidden.stride(0),
        MEMBERS=members, TRANSPOSED=transposed, BIAS=biased, LENGTH=lengths is not None,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        RANK=rank_block(max(B.shape[1] for B in b), b[0].dtype) if b else 0, SMALLEST=smallest,
        PRECISION=precision(x.dtype), num_warps=tile.warps, enable_fp_fusion=True, num_stages=tile.stages,
    )  # fmt: skip
    return outputs
