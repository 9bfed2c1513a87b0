"""Products of sorted tokens with the frozen matrices of their experts, each with a low-rank branch of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import peftc.kernels.expert_linear as expert_linear
from peftc.kernels.common.operation import follow_autocast, operation
from peftc.kernels.common.products import product
from peftc.kernels.common.shapes import like
from peftc.kernels.expert_linear import groups, zeros_behind
from peftc.kernels.lora_linear import accumulate_


def reference(x: Tensor, weight: Tensor, ends: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """y = x W_e + scale * S B_eᵀ and S = x A_eᵀ; W_e + scale * (B_e A_e)ᵀ is never formed.

    Args:
        x, weight, ends: as in `expert_linear`.
        a: A [E, r, n_in], of the dtype that the branch is computed in.
        b: B [E, n_out, r], of A's dtype.
        scale: of the branch.
    """
    hidden = expert_linear.reference(x.to(a.dtype), a.transpose(1, 2), ends)
    branch = scale * expert_linear.reference(hidden, b.transpose(1, 2), ends)
    return expert_linear.reference(x, weight, ends) + branch.to(x.dtype), hidden


@operation("expert_lora", ("cpu", "cuda"))
def expert_lora(x: Tensor, weight: Tensor, ends: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Expert by expert, B's product accumulated into the base's."""
    y = zeros_behind(x.new_empty(x.shape[0], weight.shape[2]), ends)
    hidden = zeros_behind(x.new_empty(x.shape[0], a.shape[1], dtype=a.dtype), ends)
    for expert, part in groups(ends):
        product(x[part], weight[expert], out=y[part])
        product(x[part].to(a.dtype), a[expert].t(), out=hidden[part])
        accumulate_(y[part], hidden[part], b[expert].t(), scale)
    return y, hidden


@expert_lora.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[2]), x.new_empty(x.shape[0], a.shape[1], dtype=a.dtype)


@operation("expert_lora_backward", ("cpu", "cuda"))
def expert_lora_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, ends: Tensor, a: Tensor, b: Tensor, scale: float,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Those of [dx, dA, dB] whose entry in `needs` is set."""
    dx = zeros_behind(like(x), ends) if needs[0] else None
    da = torch.zeros_like(a, memory_format=torch.contiguous_format) if needs[1] else None
    db = torch.zeros_like(b, memory_format=torch.contiguous_format) if needs[2] else None
    for expert, part in groups(ends):
        dy = grad[part].to(b.dtype)
        dhidden = product(dy, b[expert]).mul_(scale)
        if dx is not None:
            product(grad[part], weight[expert].t(), out=dx[part])
            accumulate_(dx[part], dhidden, a[expert])
        if da is not None:
            torch.mm(dhidden.t(), x[part].to(a.dtype), out=da[expert])
        if db is not None:
            db[expert] = ((hidden[part] * scale).t() @ dy).t()
    return [tensor for tensor in (dx, da, db) if tensor is not None]


@expert_lora_backward.register_fake
def _(
    grad: Tensor, x: Tensor, hidden: Tensor, weight: Tensor, ends: Tensor, a: Tensor, b: Tensor, scale: float,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    return [like(tensor) for tensor, needed in zip((x, a, b), needs, strict=True) if needed]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, ends, a, b, ctx.scale = inputs
    ctx.save_for_backward(x, output[1], weight, ends, a, b)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_x, needs_weight, _, needs_a, needs_b, _ = ctx.needs_input_grad
    if grad is None:
        return (None,) * 6
    x, _, _, ends, *_ = saved = ctx.saved_tensors  # once: a checkpoint unpacks them only once
    needs = [needs_x, needs_a, needs_b]
    results = iter(torch.ops.peftc.expert_lora_backward(grad, *saved, ctx.scale, needs))
    dx, da, db = (next(results) if needed else None for needed in needs)
    dweight = torch.ops.peftc.expert_linear_weight_backward(grad, x, ends) if needs_weight else None
    return dx, dweight, None, da, db, None


expert_lora.register_autograd(_backward, setup_context=_save)
follow_autocast(expert_lora)


@register_flop_formula(torch.ops.peftc.expert_lora)
def _flops(
    x: Sequence[int], weight: Sequence[int], ends: Any, a: Sequence[int], *_: Any, out_shape: Any = None, **__: Any
) -> int:
    n_in, n_out = weight[1:]
    return 2 * x[0] * (n_in * n_out + a[1] * (n_in + n_out))


@register_flop_formula(torch.ops.peftc.expert_lora_backward)
def _backward_flops(
    grad: Any, x: Sequence[int], hidden: Any, weight: Sequence[int], ends: Any, a: Sequence[int], b: Any, scale: Any,
    needs: Sequence[bool], *, out_shape: Any = None, **_: Any,
) -> int:  # fmt: skip
    n_in, n_out = weight[1:]
    return 2 * x[0] * (a[1] * (n_out * (1 + needs[2]) + n_in * (needs[0] + needs[1])) + n_in * n_out * needs[0])
