"""Bottleneck adapters and residuals (Houlsby et al. 2019, arXiv:1902.00751), also in parallel (He et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from peftc.kernels.common.activations import activate, check, differentiate_
from peftc.kernels.common.operation import follow_autocast, on_cuda, operation
from peftc.kernels.common.shapes import like, rows
from peftc.kernels.lora_linear import accumulate_


def reference(
    x: Tensor, residual: Tensor | None, down: Tensor, down_bias: Tensor | None, up: Tensor, up_bias: Tensor | None,
    scale: float, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = h + scale * (U act(z) + c) and z = D x + b; h is the residual, or x where that is None.

    Args:
        x: [..., n_in].
        residual: [..., n_out], of any dtype, which is y's; None where the adapter stands behind a layer.
        down: D [m, n_in], of the dtype that the branch is computed in; down_bias [m] or None.
        up: U [n_out, m], of D's dtype; up_bias [n_out] or None.
        scale: of the branch.
        activation: one of `activations.ACTIVATIONS`.
    """
    z = F.linear(x.to(down.dtype), down, down_bias)
    base = x if residual is None else residual
    return base + (F.linear(activate(z, activation), up, up_bias) * scale).to(base.dtype), z


@operation("adapter")
def adapter(
    x: Tensor, residual: Tensor | None, down: Tensor, down_bias: Tensor | None, up: Tensor, up_bias: Tensor | None,
    scale: float, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same, the branch summed into the copy of the residual."""
    check(activation)
    inner = rows(x).to(down.dtype)
    z = torch.mm(inner, down.t()) if down_bias is None else torch.addmm(down_bias, inner, down.t())
    base = x if residual is None else residual
    y = like(base)
    if up_bias is None:
        y.copy_(base)
    else:
        torch.add(base, up_bias.to(base.dtype), alpha=scale, out=y)
    accumulate_(y.view(-1, y.shape[-1]), activate(z, activation), up.t(), scale)
    return y, z.view(*x.shape[:-1], z.shape[1])


@adapter.register_fake
def _(
    x: Tensor, residual: Tensor | None, down: Tensor, down_bias: Tensor | None, up: Tensor, up_bias: Tensor | None,
    scale: float, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check(activation)
    return like(x if residual is None else residual), x.new_empty((*x.shape[:-1], down.shape[0]), dtype=down.dtype)


@operation("adapter_backward", ("cpu", "cuda"))
def adapter_backward(
    grad: Tensor, x: Tensor, z: Tensor, down: Tensor, up: Tensor, scale: float, activation: str, behind: bool,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Those of [dx, dD, db, dU, dc] whose entry in `needs` is set; `behind`: x is the residual, too."""
    flat, z = rows(grad), rows(z)
    wider = flat.to(up.dtype)
    dz = differentiate_(torch.mm(wider, up).mul_(scale), z, activation)
    results = []
    if needs[0]:
        dx = flat.to(x.dtype, copy=True) if behind else torch.zeros_like(rows(x))
        results.append(accumulate_(dx.contiguous(), dz, down).view(x.shape))
    if needs[1]:
        results.append(dz.t() @ rows(x).to(dz.dtype))
    if needs[2]:
        results.append(dz.sum(0))
    if needs[3]:
        results.append((activate(z, activation).mul(scale).t() @ wider).t().contiguous())
    if needs[4]:
        results.append(wider.sum(0).mul_(scale))
    return results


@adapter_backward.register_fake
def _(
    grad: Tensor, x: Tensor, z: Tensor, down: Tensor, up: Tensor, scale: float, activation: str, behind: bool,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    everything = [
        like(x), like(down), down.new_empty(down.shape[0]), like(up), up.new_empty(up.shape[0])
    ]  # fmt: skip
    return [tensor for tensor, needed in zip(everything, needs, strict=True) if needed]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, down, _, up, _, ctx.scale, ctx.activation = inputs
    ctx.behind = residual is None
    ctx.save_for_backward(x, output[1], down, up)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    x, z, down, up = ctx.saved_tensors
    needs_x, needs_residual, *others = ctx.needs_input_grad[:6]
    needs = [needs_x, *others]
    results = iter(())
    if any(needs):
        results = iter(
            torch.ops.peftc.adapter_backward(grad, x, z, down, up, ctx.scale, ctx.activation, ctx.behind, needs)
        )
    dx, *rest = [next(results) if needed else None for needed in needs]
    return dx, grad if needs_residual else None, *rest, None, None


adapter.register_autograd(_backward, setup_context=_save)
follow_autocast(adapter)


@register_flop_formula(torch.ops.peftc.adapter)
def _flops(
    x: Sequence[int], residual: Any, down: Sequence[int], down_bias: Any, up: Sequence[int], *_: Any,
    out_shape: Any = None, **__: Any,
) -> int:  # fmt: skip
    return 2 * prod(x[:-1]) * (prod(down) + prod(up))


@register_flop_formula(torch.ops.peftc.adapter_backward)
def _backward_flops(
    grad: Any, x: Sequence[int], z: Any, down: Sequence[int], up: Sequence[int], scale: Any, activation: Any,
    behind: Any, needs: Sequence[bool], *, out_shape: Any = None, **_: Any,
) -> int:  # fmt: skip
    products = prod(up) * (1 + needs[3]) + prod(down) * (needs[0] + needs[1])
    return 2 * prod(x[:-1]) * products


on_cuda(adapter, "adapter", "forward")
