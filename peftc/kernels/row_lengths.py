"""The lengths of the rows of W + s B A, for which nothing of W's size is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from peftc.kernels.common.operation import first_derivative, on_cuda, operation

SHRUNK = 2.0**-8  # of A beside a W in fp16, whose products may pass what fp16 has


def reference(weight: Tensor, a: Tensor, b: Tensor, scale: float, least: float) -> Tensor:
    """|W + scale B A| of each row, in A's precision, or the root of `least` where that is more.

    Args:
        weight: [n_out, n_in], frozen.
        a: [r, n_in], which may be wider than W.
        b: [n_out, r], of A's dtype.
        scale: a number.
        least: no square of a length is less.
    """
    result: Tensor = (weight.to(a.dtype) + scale * (b @ a)).square().sum(1).clamp_min(least).sqrt()
    return result


@operation("row_lengths")
def row_lengths(weight: Tensor, a: Tensor, b: Tensor, scale: float, least: float) -> Tensor:
    """The same from |W|² + 2 s W . B A + s² |B A|². Rounding shows where s B A all but cancels a row of W."""
    own = torch.linalg.vector_norm(weight, dim=1, dtype=a.dtype)
    shrunk = SHRUNK if weight.dtype is torch.float16 else 1.0
    cross = (b * (weight @ (a if shrunk == 1 else a * shrunk).to(weight.dtype).t())).sum(1)
    added = (b * (b @ (a @ a.t()))).sum(1)
    squared = own.square_().add_(cross, alpha=2 * scale / shrunk).add_(added, alpha=scale**2)
    lengths: Tensor = squared.clamp_min_(least).sqrt_()
    return lengths


@row_lengths.register_fake
def _(weight: Tensor, a: Tensor, b: Tensor, scale: float, least: float) -> Tensor:
    return a.new_empty(weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, a, b, ctx.scale, ctx.least = inputs
    ctx.save_for_backward(weight, a, b, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of what was unfrozen behind the compiler's back: DoRA takes its lengths for constant."""
    first_derivative()
    weight, a, b, lengths = ctx.saved_tensors
    share = torch.where(lengths.square() > ctx.least, grad / lengths, 0)
    directed = share[:, None] * (weight.to(a.dtype) + ctx.scale * (b @ a))
    needs_weight, needs_a, needs_b = ctx.needs_input_grad[:3]
    return (
        directed.to(weight.dtype) if needs_weight else None, ctx.scale * (b.t() @ directed) if needs_a else None,
        ctx.scale * (directed @ a.t()) if needs_b else None, None, None,
    )  # fmt: skip


row_lengths.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.peftc.row_lengths)
def _flops(weight: Any, a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    (n_out, n_in), rank = weight, a[0]
    return int(2 * rank * (n_out * n_in + rank * (n_in + n_out)))


on_cuda(row_lengths, "row_lengths", "forward")
