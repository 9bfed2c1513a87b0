"""Frozen linears whose outputs have a trained factor each (IA3, Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from peftc.kernels.operation import follow_autocast, on_cuda, operation
from peftc.kernels.products import product
from peftc.kernels.shapes import rows, wide


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, length: Tensor, transposed: bool) -> Tensor:
    """y = length * (W x + bias).

    Args:
        x: [..., n_in].
        weight: W, frozen: [n_out, n_in], or [n_in, n_out] where `transposed`.
        bias: [n_out] or None; scaled, too.
        length: [n_out], what each output is multiplied by.
    """
    y = x @ (weight if transposed else weight.t())
    return (length * (y if bias is None else y + bias)).to(x.dtype)


def smallest(dtype: torch.dtype) -> float:
    """The length that stands for 0 beside numbers of `dtype`: 2^-63 in fp32 and bf16, 2^-511 in fp64, 2^-11 in fp16.

    A product times it is nothing beside the rounding of any other product of its size, and still a normal number: in
    fp16, whose exponents have five bits, that is the rounding itself.
    """
    limits = torch.finfo(dtype)
    return float(min(limits.tiny**0.5, limits.eps / 2))


def apart_from_zero(length: Tensor, dtype: torch.dtype) -> Tensor:
    """`length` with what is smaller than `smallest(dtype)` as large as that, so that it can be divided by."""
    return length.abs().clamp_min(smallest(dtype)).copysign(length)


@operation("scaled_linear")
def scaled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, length: Tensor, transposed: bool) -> Tensor:
    """The same, multiplied in place, and by lengths that are apart from zero.

    The gradient of a length is that of its output times the product, which is so had from the output, always: nothing
    is kept besides, and nobody has to look which lengths are 0.
    """
    y = product(rows(x), weight if transposed else weight.t(), bias)
    return y.mul_(apart_from_zero(length, y.dtype)).view(*x.shape[:-1], y.shape[1])


@scaled_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, length: Tensor, transposed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[transposed]))


@operation("scaled_linear_backward", ("cpu", "cuda"))
def scaled_linear_backward(
    grad: Tensor, y: Tensor, weight: Tensor, length: Tensor, transposed: bool, needs: list[bool]
) -> list[Tensor]:
    """Those of [dx, dbias, dlength] whose entry in `needs` is set; sums over rows are kept in fp32 at least."""
    flat, factor, results = rows(grad), apart_from_zero(length, y.dtype), []
    room = None
    if needs[2]:
        room = flat.to(wide(y.dtype)) * rows(y)
        dlength = (room.sum(0) / factor).to(length.dtype)
        room = room if room.dtype is flat.dtype else None
    if needs[0] or needs[1]:
        inner = torch.mul(flat, factor.to(flat.dtype), out=room)
        if needs[0]:
            dx = product(inner, weight.t() if transposed else weight)
            results.append(dx.view(*grad.shape[:-1], dx.shape[1]))
        if needs[1]:
            results.append(inner.sum(0))
    return [*results, dlength] if needs[2] else results


@scaled_linear_backward.register_fake
def _(
    grad: Tensor, y: Tensor, weight: Tensor, length: Tensor, transposed: bool, needs: list[bool]
) -> list[Tensor]:  # fmt: skip
    dx = grad.new_empty((*grad.shape[:-1], weight.shape[not transposed]))
    everything = dx, grad.new_empty(length.shape), length.new_empty(length.shape)
    return [tensor for tensor, needed in zip(everything, needs, strict=True) if needed]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, _, length, ctx.transposed = inputs
    if weight.requires_grad:
        raise NotImplementedError("the weight of scaled_linear is frozen")
    ctx.save_for_backward(output, weight, length)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, weight, length = ctx.saved_tensors
    needs_x, _, needs_bias, needs_length, _ = ctx.needs_input_grad
    needs = [needs_x, needs_bias, needs_length]
    results = iter(torch.ops.peftc.scaled_linear_backward(grad, y, weight, length, ctx.transposed, needs))
    dx, dbias, dlength = [next(results) if needed else None for needed in needs]
    return dx, None, dbias, dlength, None


scaled_linear.register_autograd(_backward, setup_context=_save)
follow_autocast(scaled_linear)


@register_flop_formula(torch.ops.peftc.scaled_linear)
def _flops(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * prod(x[:-1]) * prod(weight)


@register_flop_formula(torch.ops.peftc.scaled_linear_backward)
def _backward_flops(
    grad: Sequence[int], y: Any, weight: Sequence[int], length: Any, transposed: Any, needs: Sequence[bool], *,
    out_shape: Any = None, **_: Any,
) -> int:  # fmt: skip
    return 2 * prod(grad[:-1]) * prod(weight) * needs[0]


on_cuda(scaled_linear, "scaled_linear", "forward")
