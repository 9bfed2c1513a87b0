"""Products of sorted tokens with the matrices of their experts.

A frozen stack costs no gradient of its own: transformers' `grouped_mm_fallback` makes one, as large as the stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from peftc.kernels.common.operation import follow_autocast, operation
from peftc.kernels.common.products import product


def reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """y[t] = x[t] W_e, where expert e has the tokens from ends[e − 1] up to ends[e]; 0 behind the last.

    Args:
        x: [T, n_in], sorted by expert.
        weight: [E, n_in, n_out], or a view that turns [E, n_out, n_in] around.
        ends: [E] int32 or int64, ascending.
    """
    expert = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True)
    padded = torch.cat([weight, torch.zeros_like(weight[:1])])
    return torch.bmm(x[:, None], padded[expert])[:, 0]


def groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Every expert that has tokens, and where they are."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = max(start, end)


def zeros_behind(result: Tensor, ends: Tensor) -> Tensor:
    """Rows that belong to no expert are 0."""
    last = int(ends[-1]) if len(ends) else 0
    if last < len(result):
        result[last:] = 0
    return result


@operation("expert_linear", ("cpu", "cuda"))
def expert_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """A product for each expert that has tokens, written where it belongs."""
    y = zeros_behind(x.new_empty(x.shape[0], weight.shape[2]), ends)
    for expert, part in groups(ends):
        product(x[part], weight[expert], out=y[part])
    return y


@expert_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@operation("expert_linear_weight_backward", ("cpu", "cuda"))
def expert_linear_weight_backward(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """dW_e = x_eᵀ dy_e of every expert, [E, n_in, n_out]; 0 where it has no token."""
    dweight = x.new_zeros(ends.shape[0], x.shape[1], grad.shape[1])
    for expert, part in groups(ends):
        torch.mm(x[part].t(), grad[part], out=dweight[expert])
    return dweight


@expert_linear_weight_backward.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], grad.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ends = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, ends)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    dx = torch.ops.peftc.expert_linear(grad, weight.transpose(1, 2), ends) if needs_x else None
    dweight = torch.ops.peftc.expert_linear_weight_backward(grad, x, ends) if needs_weight else None
    return dx, dweight, None


expert_linear.register_autograd(_backward, setup_context=_save)
follow_autocast(expert_linear)


@register_flop_formula(torch.ops.peftc.expert_linear)
def _flops(x: Sequence[int], weight: Sequence[int], ends: Any, *, out_shape: Any = None, **_: Any) -> int:
    return 2 * x[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.peftc.expert_linear_weight_backward)
def _weight_flops(grad: Sequence[int], x: Sequence[int], ends: Any, *, out_shape: Any = None, **_: Any) -> int:
    return 2 * x[0] * x[1] * grad[1]
