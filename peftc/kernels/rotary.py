"""Rotary positions (Su et al. 2021, arXiv:2104.09864): pairs of a head's numbers turned by the angle of their token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftc.kernels.common.operation import on_cuda, operation


def reference(xs: Sequence[Tensor], cosine: Tensor, sine: Tensor) -> list[Tensor]:
    """x cos + [-x₂, x₁] sin of each x = [x₁, x₂], as models write it: number i goes with number i + width/2.

    Args:
        xs: [..., width] each, such as queries and keys; an even width.
        cosine: [..., width], whose shape broadcasts to that of each x.
        sine: as cosine.
    """
    return [x * cosine + torch.cat([-half, other], -1) * sine for x in xs for other, half in [x.chunk(2, -1)]]


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    middle = x.shape[-1] // 2
    return x[..., :middle], x[..., middle:]


def _like(x: Tensor, cosine: Tensor) -> Tensor:
    """Room for a result, laid out as x: heads that lie side by side for each token still do."""
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, cosine.dtype))


def _turn(x: Tensor, cosine: Tensor, sines: tuple[Tensor, Tensor], signs: tuple[int, int]) -> Tensor:
    """x cos, and of its halves the other one times a sine added or taken off, rounded as the definition is."""
    y = torch.mul(x, cosine, out=_like(x, cosine))
    for target, other, sine, sign in zip(_halves(y), _halves(x)[::-1], sines, signs, strict=True):
        if y.dtype.itemsize < 4:
            target.add_(other * sine, alpha=sign)  # addcmul would not round the product
        else:
            target.addcmul_(other, sine, value=sign)
    return y


@operation("rotary")
def rotary(xs: list[Tensor], cosine: Tensor, sine: Tensor) -> list[Tensor]:
    """The same in place: numbers of 32 bits without a temporary, of 16 bits with one, so that both round alike."""
    return [_turn(x, cosine, _halves(sine), (-1, 1)) for x in xs]


@rotary.register_fake
def _(xs: list[Tensor], cosine: Tensor, sine: Tensor) -> list[Tensor]:
    return [_like(x, cosine) for x in xs]


@operation("rotary_backward")
def rotary_backward(grads: list[Tensor], cosine: Tensor, sine: Tensor) -> list[Tensor]:
    """dx = [g₁ cos₁ + g₂ sin₂, g₂ cos₂ − g₁ sin₁] of each gradient g: of an angle's, turned back."""
    return [_turn(grad, cosine, _halves(sine)[::-1], (1, -1)) for grad in grads]


@rotary_backward.register_fake
def _(grads: list[Tensor], cosine: Tensor, sine: Tensor) -> list[Tensor]:
    return [_like(grad, cosine) for grad in grads]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    xs, cosine, sine = inputs
    if cosine.requires_grad or sine.requires_grad:
        raise NotImplementedError("angles have no gradients here; the fusion leaves those that learn as they are")
    ctx.dtypes = [x.dtype for x in xs]
    ctx.save_for_backward(cosine, sine)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[list[Tensor | None], None, None]:
    given = [grad for grad in grads if grad is not None]
    turned = iter(torch.ops.peftc.rotary_backward(given, *ctx.saved_tensors) if given else ())
    return [
        None if grad is None else next(turned).to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)
    ], None, None  # fmt: skip


rotary.register_autograd(_backward, setup_context=_save)

on_cuda(rotary, "rotary", "forward")
on_cuda(rotary_backward, "rotary", "backward")
