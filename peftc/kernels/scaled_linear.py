"""Frozen linears whose outputs have a trained factor each (IA3, Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from peftc.kernels.common.operation import follow_autocast, on_cuda, operation
from peftc.kernels.common.products import product
from peftc.kernels.common.shapes import rows, wide
from peftc.kernels.lora_linear import weight_gradients


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

    A product times it is nothing beside the rounding of any other product of its size, and still a normal number. Not
    so in fp16, whose exponents have five bits: there it is the rounding itself, and gradients of small factors are
    coarse, to some per cent where products are below 2^-7. No fp16 graph is fused so; autocast to fp16 may meet it.
    """
    limits = torch.finfo(dtype)
    return float(min(limits.tiny**0.5, limits.eps / 2))


def apart_from_zero(length: Tensor, dtype: torch.dtype) -> Tensor:
    """`length` with `smallest(dtype)` for what is nearer to 0, so that it can be divided by."""
    return length.masked_fill(length.abs() < smallest(dtype), smallest(dtype))


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


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, length, ctx.transposed = inputs
    ctx.save_for_backward(output, weight, length, *((x,) if weight.requires_grad else ()))  # unfrozen by hand


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """In ATen, so that a graph that does not need dx, such as the first block's, does not multiply for it."""
    y, weight, length, *x = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_length, _ = ctx.needs_input_grad
    factor = apart_from_zero(length, y.dtype)
    dx, dweight, dbias, dlength = None, None, None, None
    if needs_x or needs_weight or needs_bias:
        inner = grad * factor.to(grad.dtype)
        dx = inner @ (weight.t() if ctx.transposed else weight) if needs_x else None
        if needs_weight:
            (dweight,) = weight_gradients([inner], x[0], ctx.transposed, [True])
        dbias = inner.sum_to_size(length.shape) if needs_bias else None
    if needs_length:
        dlength = ((grad.to(wide(y.dtype)) * y).sum_to_size(length.shape) / factor).to(length.dtype)
    return dx, dweight, dbias, dlength, None


scaled_linear.register_autograd(_backward, setup_context=_save)
follow_autocast(scaled_linear)


@register_flop_formula(torch.ops.peftc.scaled_linear)
def _flops(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * prod(x[:-1]) * prod(weight)


on_cuda(scaled_linear, "scaled_linear", "forward")
