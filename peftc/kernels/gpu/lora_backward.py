"""The backward pass of LoRA linears in Triton: a launch for a group's gradients of S, of the A's, of the B's.

What goes through the frozen weights is torch's product; the branches' part of dx is added to it in one launch more.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
from torch import Tensor
from triton import language as tl

from peftc.kernels.common.shapes import rows
from peftc.kernels.gpu.launch import HALVES, TRITON_DTYPES, on_device, power_of_two, precision
from peftc.kernels.gpu.lora_linear import GROUP, rank_block
from peftc.kernels.gpu.random_bits import keeps, word_keys
from peftc.kernels.seeded_dropout import dropped_levels, kept_scale

COLUMNS = 64  # numbers of a row that a program works on


@triton.jit
def hidden_gradient_kernel(
    g0, g1, g2, g3, b0, b1, b2, b3, d0, d1, d2, d3, s0, s1, s2, s3, n0, n1, n2, n3, r0, r1, r2, r3, count, all_ranks,
    MEMBERS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS_i = s_i dy_i B_i, ROWS by RANK of the member that the program is of; dy_i [count, n_i], B_i [n_i, r_i]."""
    program = tl.program_id(0)
    high = tl.cdiv(count, ROWS)
    g, b, d, scale, n, rank, begin = g0, b0, d0, s0, n0, r0, 0
    if MEMBERS > 1:
        end = high * tl.cdiv(r0, RANK)
        if program >= end:
            g, b, d, scale, n, rank, begin = g1, b1, d1, s1, n1, r1, end
    if MEMBERS > 2:
        end += high * tl.cdiv(r1, RANK)
        if program >= end:
            g, b, d, scale, n, rank, begin = g2, b2, d2, s2, n2, r2, end
    if MEMBERS > 3:
        end += high * tl.cdiv(r2, RANK)
        if program >= end:
            g, b, d, scale, n, rank, begin = g3, b3, d3, s3, n3, r3, end
    local = program - begin
    row = (local % high).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    r = (local // high) * RANK + tl.arange(0, RANK)
    depth = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(0, n, DEPTH):
        k = start + depth
        mask = (row[:, None] < count) & (k[None, :] < n)
        gradient = tl.load(g + row[:, None] * n + k[None, :], mask=mask, other=0.0).to(b.dtype.element_ty)
        mask = (k[:, None] < n) & (r[None, :] < rank)
        factor = tl.load(b + k[:, None].to(tl.int64) * rank + r[None, :], mask=mask, other=0.0)
        total = tl.dot(gradient, factor, total, input_precision=PRECISION)
    inside = (row[:, None] < count) & (r[None, :] < rank)
    tl.store(d + row[:, None] * all_ranks + r[None, :], (total * scale).to(d.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["salt"])
def factor_gradient_kernel(
    x0, x1, x2, x3, h0, h1, h2, h3, o0, o1, o2, o3, s0, s1, s2, s3, n0, n1, n2, n3, r0, r1, r2, r3,
    seed, salt, threshold, count, all_ranks,
    MEMBERS: tl.constexpr, DROPOUT: tl.constexpr, TURNED: tl.constexpr, WIDE: tl.constexpr, RANK: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o_i = s_i x_iᵀ h_i, summed over all rows: WIDE by RANK of [n_i, r_i], which is written TURNED or as it is."""
    program = tl.program_id(0)
    x, h, o, scale, n, rank, begin = x0, h0, o0, s0, n0, r0, 0
    if MEMBERS > 1:
        end = tl.cdiv(n0, WIDE) * tl.cdiv(r0, RANK)
        if program >= end:
            x, h, o, scale, n, rank, begin = x1, h1, o1, s1, n1, r1, end
    if MEMBERS > 2:
        end += tl.cdiv(n1, WIDE) * tl.cdiv(r1, RANK)
        if program >= end:
            x, h, o, scale, n, rank, begin = x2, h2, o2, s2, n2, r2, end
    if MEMBERS > 3:
        end += tl.cdiv(n2, WIDE) * tl.cdiv(r2, RANK)
        if program >= end:
            x, h, o, scale, n, rank, begin = x3, h3, o3, s3, n3, r3, end
    local = program - begin
    across = tl.cdiv(n, WIDE)
    column = (local % across) * WIDE + tl.arange(0, WIDE)
    r = (local // across) * RANK + tl.arange(0, RANK)
    first, second = 0, 0
    if DROPOUT:
        first, second = word_keys(seed, salt)
    total = tl.zeros((WIDE, RANK), tl.float32)
    for start in range(0, count, DEPTH):
        row = (start + tl.arange(0, DEPTH)).to(tl.int64)
        index = row[None, :] * n + column[:, None]
        inside = (row[None, :] < count) & (column[:, None] < n)
        values = tl.load(x + index, mask=inside, other=0.0).to(h.dtype.element_ty)
        if DROPOUT:
            values = tl.where(keeps(index, first, second, threshold), values, 0.0)
        mask = (row[:, None] < count) & (r[None, :] < rank)
        narrow = tl.load(h + row[:, None] * all_ranks + r[None, :], mask=mask, other=0.0)
        total = tl.dot(values, narrow, total, input_precision=PRECISION)
    inside = (column[:, None] < n) & (r[None, :] < rank)
    if TURNED:
        place = o + r[None, :].to(tl.int64) * n + column[:, None]
    else:
        place = o + column[:, None].to(tl.int64) * rank + r[None, :]
    tl.store(place, (total * scale).to(o.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["salt"])
def input_gradient_kernel(
    dx, dhidden, a, seed, salt, threshold, factor, count, n_in, rank,
    DROPOUT: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dx += dhidden A [count, n_in], or the part of it that dropout keeps, scaled."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros((ROWS, WIDE), tl.float32)
    for start in range(0, rank, RANK):
        r = start + tl.arange(0, RANK)
        mask = (row[:, None] < count) & (r[None, :] < rank)
        narrow = tl.load(dhidden + row[:, None] * rank + r[None, :], mask=mask, other=0.0)
        mask = (r[:, None] < rank) & (column[None, :] < n_in)
        matrix = tl.load(a + r[:, None] * n_in + column[None, :], mask=mask, other=0.0)
        total = tl.dot(narrow, matrix, total, input_precision=PRECISION)
    index = row[:, None] * n_in + column[None, :]
    inside = (row[:, None] < count) & (column[None, :] < n_in)
    if DROPOUT:
        first, second = word_keys(seed, salt)
        total = tl.where(keeps(index, first, second, threshold), total * factor, 0.0)
    total += tl.load(dx + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + index, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def length_gradient_kernel(
    g0, g1, g2, g3, y0, y1, y2, y3, c0, c1, c2, c3, l0, l1, l2, l3, i0, i1, i2, i3, d0, d1, d2, d3, n0, n1, n2, n3,
    count, MEMBERS: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """length_i dy_i, and the gradient of length_i, Σ over rows of dy_i (y_i - bias_i) / length_i; 0 where that is 0."""
    program = tl.program_id(0)
    g, y, c, length, inner, d, n, begin = g0, y0, c0, l0, i0, d0, n0, 0
    if MEMBERS > 1:
        end = tl.cdiv(n0, WIDE)
        if program >= end:
            g, y, c, length, inner, d, n, begin = g1, y1, c1, l1, i1, d1, n1, end
    if MEMBERS > 2:
        end += tl.cdiv(n1, WIDE)
        if program >= end:
            g, y, c, length, inner, d, n, begin = g2, y2, c2, l2, i2, d2, n2, end
    if MEMBERS > 3:
        end += tl.cdiv(n2, WIDE)
        if program >= end:
            g, y, c, length, inner, d, n, begin = g3, y3, c3, l3, i3, d3, n3, end
    column = (program - begin) * WIDE + tl.arange(0, WIDE)
    factor = tl.load(length + column, mask=column < n, other=1.0).to(tl.float32)
    bias = tl.zeros((WIDE,), tl.float32)
    if BIAS:
        bias = tl.load(c + column, mask=column < n, other=0.0).to(tl.float32)
    total = tl.zeros((WIDE,), tl.float32)
    for start in range(0, count, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        index = row[:, None] * n + column[None, :]
        inside = (row[:, None] < count) & (column[None, :] < n)
        gradient = tl.load(g + index, mask=inside, other=0.0).to(tl.float32)
        output = tl.load(y + index, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(gradient * (output - bias[None, :]), 0)
        tl.store(inner + index, (gradient * factor[None, :]).to(inner.dtype.element_ty), mask=inside)
    total = tl.where(factor == 0.0, 0.0, total / tl.where(factor == 0.0, 1.0, factor))
    tl.store(d + column, total.to(d.dtype.element_ty), mask=column < n)


def _filled(values: Sequence[object]) -> list[object]:
    return [*values, *[values[0]] * (GROUP - len(values))]


def _groups(count: int) -> list[slice]:
    return [slice(start, start + GROUP) for start in range(0, count, GROUP)]


def backward(
    grads: Sequence[Tensor | None], x: Tensor, hidden: Tensor, weights: Sequence[Tensor], a: Sequence[Tensor],
    b: Sequence[Tensor], scales: Sequence[float], transposed: bool, seed: Tensor | None, p: float, salt: int,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """As `peftc::lora_linear_backward`."""
    known = [grad for grad in grads if grad is not None]
    if not known or not {x.dtype, known[0].dtype, a[0].dtype} <= set(TRITON_DTYPES):
        return NotImplemented
    n, flat, kept = len(weights), rows(x).contiguous(), rows(hidden).contiguous()
    given = [None if grad is None else rows(grad).contiguous() for grad in grads]
    ends = [0, *accumulate(A.shape[0] for A in a)]
    pieces = [slice(*ends[i : i + 2]) for i in range(n)]
    used = {i: grad for i, grad in enumerate(given) if grad is not None}
    dropping = seed is not None and dropped_levels(p) > 0
    with on_device(x):
        dhidden = torch.empty_like(kept) if len(used) == n else torch.zeros_like(kept)
        wanted = [(grad, b[i].contiguous(), dhidden[:, pieces[i]], scales[i]) for i, grad in used.items()]
        for part in _groups(len(wanted)):
            _hidden_gradients(wanted[part])
        db = [torch.empty_like(B) if i in used else torch.zeros_like(B) for i, B in enumerate(b)]
        wanted = [(grad, kept[:, pieces[i]], db[i], scales[i]) for i, grad in used.items() if needs[1 + n + i]]
        for part in _groups(len(wanted)):
            _factor_gradients(wanted[part], turned=False)
        da = [torch.empty_like(A) for A in a]
        kept_scales = kept_scale(p) if dropping else 1.0
        wanted = [(flat, dhidden[:, pieces[i]], da[i], kept_scales) for i in range(n) if needs[1 + i]]
        for part in _groups(len(wanted)):
            _factor_gradients(wanted[part], turned=True, seed=seed if dropping else None, p=p, salt=salt)
        dx = [_input_gradient(given, flat, weights, transposed, dhidden, a, seed if dropping else None, p, salt)
              .view(x.shape)] if needs[0] else []  # fmt: skip
    learned = zip([*da, *db], needs[1 : 1 + 2 * n], strict=True)
    return dx + [tensor for tensor, needed in learned if needed]


def dora_backward(
    grads: Sequence[Tensor | None], x: Tensor, outputs: Sequence[Tensor], hidden: Tensor, weights: Sequence[Tensor],
    biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor], lengths: Sequence[Tensor],
    scales: Sequence[float], transposed: bool, seed: Tensor | None, p: float, salt: int, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """As `peftc::dora_linear_backward`."""
    used = [i for i, grad in enumerate(grads) if grad is not None]
    kinds = {x.dtype, lengths[0].dtype, *(grad.dtype for grad in grads if grad is not None)}
    if not used or not kinds <= set(TRITON_DTYPES):
        return NotImplemented
    n = len(weights)
    inner: list[Tensor | None] = [None] * n
    dlengths = [torch.empty_like(d) if i in used else torch.zeros_like(d) for i, d in enumerate(lengths)]
    wanted = []
    for i in used:
        grad, bias = grads[i], biases[i] if biases else None
        assert grad is not None
        flat = rows(grad).contiguous()
        inner[i] = made = torch.empty_like(flat)
        wanted.append((flat, rows(outputs[i]).contiguous(), bias, lengths[i].contiguous(), made, dlengths[i]))
    with on_device(x):
        for part in _groups(len(wanted)):
            _length_gradients(wanted[part])
    results = backward(inner, x, hidden, weights, a, b, scales, transposed, seed, p, salt, needs[: 1 + 2 * n])
    return results + [d for d, needed in zip(dlengths, needs[1 + 2 * n :], strict=True) if needed]


def _hidden_gradients(members: Sequence[tuple[Tensor, Tensor, Tensor, float]]) -> None:
    """dS_i of some members, in one launch: dy_i, B_i, dS_i and the scale of each."""
    grads, b, results, scales = map(list, zip(*members, strict=True))
    count, ranks, dtype = grads[0].shape[0], [B.shape[1] for B in b], b[0].dtype
    height, width = power_of_two(count, 16, 64 if dtype in HALVES else 32), rank_block(max(ranks), dtype)
    programs = triton.cdiv(count, height) * sum(triton.cdiv(rank, width) for rank in ranks)
    if programs:
        hidden_gradient_kernel[(programs,)](
            *_filled(grads), *_filled(b), *_filled(results), *_filled(list(map(float, scales))),
            *_filled([B.shape[0] for B in b]), *_filled(ranks), count, results[0].stride(0), MEMBERS=len(grads),
            ROWS=height, RANK=width, DEPTH=rank_block(64, dtype), PRECISION=precision(dtype), num_warps=4,
            enable_fp_fusion=True, num_stages=2,
        )  # fmt: skip


def _factor_gradients(
    members: Sequence[tuple[Tensor, Tensor, Tensor, float]], *, turned: bool, seed: Tensor | None = None,
    p: float = 0.0, salt: int = 0,
) -> None:  # fmt: skip
    """s xᵀ h of some members, in one launch: x, h, the result and s of each."""
    xs, narrow, results, scales = map(list, zip(*members, strict=True))
    count, ranks, dtype = xs[0].shape[0], [h.shape[1] for h in narrow], narrow[0].dtype
    width = rank_block(max(ranks), dtype)
    widths = [x.shape[1] for x in xs]
    programs = sum(
        triton.cdiv(n, COLUMNS) * triton.cdiv(rank, width) for n, rank in zip(widths, ranks, strict=True)
    )  # fmt: skip
    if programs:
        factor_gradient_kernel[(programs,)](
            *_filled(xs), *_filled(narrow), *_filled(results), *_filled(list(map(float, scales))), *_filled(widths),
            *_filled(ranks), xs[0] if seed is None else seed, salt, dropped_levels(p), count, narrow[0].stride(0),
            MEMBERS=len(xs), DROPOUT=seed is not None, TURNED=turned, WIDE=COLUMNS, RANK=width,
            DEPTH=64 if dtype in HALVES else 16, PRECISION=precision(dtype), num_warps=4, enable_fp_fusion=True,
            num_stages=2,
        )  # fmt: skip


def _length_gradients(
    members: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]],
) -> None:
    """Of some members, in one launch: dy, y, bias, length, and room for length dy and for dlength of each."""
    grads, outputs, biases, lengths, inner, results = map(list, zip(*members, strict=True))
    biased = any(bias is not None for bias in biases)
    added = [y.new_zeros(y.shape[1]) if biased and c is None else c for y, c in zip(outputs, biases, strict=True)]
    widths = [y.shape[1] for y in outputs]
    length_gradient_kernel[(sum(triton.cdiv(n, COLUMNS) for n in widths),)](
        *_filled(grads), *_filled(outputs), *_filled(added if biased else outputs), *_filled(lengths), *_filled(inner),
        *_filled(results), *_filled(widths), grads[0].shape[0], MEMBERS=len(grads), BIAS=biased, ROWS=32,
        WIDE=COLUMNS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def _input_gradient(
    grads: Sequence[Tensor | None], x: Tensor, weights: Sequence[Tensor], transposed: bool, dhidden: Tensor,
    a: Sequence[Tensor], seed: Tensor | None, p: float, salt: int,
) -> Tensor:  # fmt: skip
    """Σ dy_i W_i + dropout(dS A) [rows, n_in]."""
    dx: Tensor | None = None
    for grad, weight in zip(grads, weights, strict=True):
        if grad is not None:
            matrix = weight.t() if transposed else weight
            dx = grad @ matrix if dx is None else dx.addmm_(grad, matrix)
    assert dx is not None
    stacked = a[0].contiguous() if len(a) == 1 else torch.cat(list(a))
    return add_input_gradient_(dx, dhidden, stacked, seed, p, salt)


def add_input_gradient_(dx: Tensor, dhidden: Tensor, a: Tensor, seed: Tensor | None, p: float, salt: int) -> Tensor:
    """dx += dhidden A, of which dropout, if there is a seed, keeps what it keeps of x. dx [rows, n_in], contiguous."""
    count, n_in = dx.shape
    height = power_of_two(count, 16, 64)
    if dx.numel():
        with on_device(dx):
            input_gradient_kernel[(triton.cdiv(count, height), triton.cdiv(n_in, COLUMNS))](
                dx, dhidden.contiguous(), a, dx if seed is None else seed, salt, dropped_levels(p),
                1.0 if seed is None else kept_scale(p), count, n_in, a.shape[0], DROPOUT=seed is not None,
                ROWS=height, WIDE=COLUMNS, RANK=rank_block(a.shape[0], a.dtype), PRECISION=precision(dx.dtype),
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return dx
