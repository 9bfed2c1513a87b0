"""Rotary positions in Triton: queries and keys in one launch, whatever their layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton import language as tl

from peftc.kernels.gpu.launch import TRITON_DTYPES, on_device, power_of_two

GROUP = 2  # tensors a launch
NUMBERS = 2048  # that a program turns, of each half
WIDEST = 1024  # numbers of a head


@triton.jit
def rotary_kernel(
    x0, x1, y0, y1, cosine, sine, rows0, rows1, heads0, heads1, tokens0, tokens1, half,
    xb0, xh0, xt0, xb1, xh1, xt1, yb0, yh0, yt0, yb1, yh1, yt1, cb, ch, ct, sb, sh, st,
    MEMBERS: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS heads of tokens of the member that the program is of; rows are numbered by batch, head and token."""
    program = tl.program_id(0)
    x, y, rows, heads, tokens, begin = x0, y0, rows0, heads0, tokens0, 0
    xb, xh, xt, yb, yh, yt = xb0, xh0, xt0, yb0, yh0, yt0
    if MEMBERS > 1:
        end = tl.cdiv(rows0, ROWS)
        if program >= end:
            x, y, rows, heads, tokens, begin = x1, y1, rows1, heads1, tokens1, end
            xb, xh, xt, yb, yh, yt = xb1, xh1, xt1, yb1, yh1, yt1
    row = (program - begin).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row % tokens, row // tokens % heads
    batch = row // tokens // heads
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row[:, None] < rows) & (column < half)
    place = x + (batch * xb + head * xh + token * xt)[:, None] + column
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    angle = (batch * cb + head * ch + token * ct)[:, None] + column
    cosine1 = tl.load(cosine + angle, mask=inside, other=0.0).to(tl.float32)
    cosine2 = tl.load(cosine + angle + half, mask=inside, other=0.0).to(tl.float32)
    angle = (batch * sb + head * sh + token * st)[:, None] + column
    sine1 = tl.load(sine + angle, mask=inside, other=0.0).to(tl.float32)
    sine2 = tl.load(sine + angle + half, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        result1 = first * cosine1 + second * sine2
        result2 = second * cosine2 - first * sine1
    else:
        result1 = first * cosine1 - second * sine1
        result2 = second * cosine2 + first * sine2
    target = y + (batch * yb + head * yh + token * yt)[:, None] + column
    tl.store(target, result1.to(y.dtype.element_ty), mask=inside)
    tl.store(target + half, result2.to(y.dtype.element_ty), mask=inside)


def forward(xs: Sequence[Tensor], cosine: Tensor, sine: Tensor) -> list[Tensor]:
    """As `peftc::rotary`."""
    return _turned(xs, cosine, sine, back=False)


def backward(grads: Sequence[Tensor], cosine: Tensor, sine: Tensor) -> list[Tensor]:
    """As `peftc::rotary_backward`."""
    return _turned(grads, cosine, sine, back=True)


def _turned(xs: Sequence[Tensor], cosine: Tensor, sine: Tensor, back: bool) -> list[Tensor]:
    width = xs[0].shape[-1]
    alike = all(x.dim() == 4 and x.dtype is xs[0].dtype for x in xs)
    if not alike or width > WIDEST or not {xs[0].dtype, cosine.dtype, sine.dtype} <= set(TRITON_DTYPES):
        return NotImplemented
    xs, (cosine, sine) = list(map(_in_a_row, xs)), map(_in_a_row, (cosine, sine))
    results = [torch.empty_like(x, dtype=torch.promote_types(x.dtype, cosine.dtype)) for x in xs]
    with on_device(xs[0]):
        for start in range(0, len(xs), GROUP):
            _launch(xs[start : start + GROUP], results[start : start + GROUP], cosine, sine, back)
    return results


def _in_a_row(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(xs: Sequence[Tensor], results: Sequence[Tensor], cosine: Tensor, sine: Tensor, back: bool) -> None:
    half = xs[0].shape[3] // 2
    height = max(1, NUMBERS // power_of_two(half, 1, WIDEST))
    both = xs[0], xs[-1]
    rows = [x.numel() // (2 * half) for x in both]
    angles = [angle.expand(xs[0].shape) for angle in (cosine, sine)]
    strides = [x.stride()[:3] for x in (*both, results[0], results[-1], *angles)]
    programs = sum(triton.cdiv(count, height) for count in rows[: len(xs)])
    if programs:
        rotary_kernel[(programs,)](
            *both, results[0], results[-1], *angles, *rows, *(x.shape[1] for x in both), *(x.shape[2] for x in both),
            half, *(stride for three in strides for stride in three), MEMBERS=len(xs), BACK=back,
            ROWS=height, WIDTH=power_of_two(half, 1, WIDEST), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
