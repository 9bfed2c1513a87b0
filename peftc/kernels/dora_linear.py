"""LoRA linears whose outputs have a trained length each (DoRA, Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import peftc.kernels.lora_linear as lora_linear
from peftc.kernels.common.operation import follow_autocast, on_cuda, operation
from peftc.kernels.common.shapes import rows

# A length below which the gradient of it is not read off y, from which the bias may have rounded it away.
SHORT = 2.0**-7


def reference(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor],
    lengths: Sequence[Tensor], scales: Sequence[float], transposed: bool, seed: Tensor | None, p: float, salt: int,
) -> list[Tensor]:  # fmt: skip
    """[y_1 … y_n, S] with y_i = length_i * (W_i x + scale_i B_i S_i) + bias_i, and S as in `lora_linear`.

    Args:
        lengths: [n_out_i], what each output is multiplied by: DoRA's m / |W + s B A|, of B's dtype.
        x, weights, biases, a, b, scales, transposed, seed, p, salt: as in `lora_linear`.
    """
    *outputs, hidden = lora_linear.reference(x, weights, [], a, b, scales, transposed, seed, p, salt)
    scaled = [(y * length).to(y.dtype) for y, length in zip(outputs, lengths, strict=True)]
    if biases:
        scaled = [y if bias is None else y + bias for y, bias in zip(scaled, biases, strict=True)]
    return [*scaled, hidden]


@operation("dora_linear")
def dora_linear(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], a: list[Tensor], b: list[Tensor],
    lengths: list[Tensor], scales: list[float], transposed: bool, seed: Tensor | None, p: float, salt: int,
) -> list[Tensor]:  # fmt: skip
    """The same, all in each output's place."""
    *outputs, hidden = lora_linear.forward(x, weights, [], a, b, scales, transposed, seed, p, salt)
    for i, y in enumerate(outputs):
        y.mul_(lengths[i])
        if biases and (bias := biases[i]) is not None:
            y.add_(bias)
    return [*outputs, hidden]


@dora_linear.register_fake
def _(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], a: list[Tensor], b: list[Tensor],
    lengths: list[Tensor], scales: list[float], transposed: bool, seed: Tensor | None, p: float, salt: int,
) -> list[Tensor]:  # fmt: skip
    return lora_linear.shapes(x, weights, biases, a, b, scales)


@operation("dora_linear_backward")
def dora_linear_backward(
    grads: list[Tensor | None], x: Tensor, outputs: list[Tensor], hidden: Tensor, weights: list[Tensor],
    biases: list[Tensor | None], a: list[Tensor], b: list[Tensor], lengths: list[Tensor], scales: list[float],
    transposed: bool, seed: Tensor | None, p: float, salt: int, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Those of [dx, dA_1 … dA_n, dB_1 … dB_n, dlength_1 … dlength_n] whose entry in `needs` is set.

    What is inside the brackets is not kept: it is (y − bias) / length, and made again where a length is short (on the
    CPU). Elsewhere what a bias has rounded away counts as 0, and so does the gradient of a length that is 0.
    """
    n = len(weights)
    inner_grads: list[Tensor | None] = []
    dlengths = []
    for i, grad in enumerate(grads):
        if grad is None:
            inner_grads.append(None)
            if needs[1 + 2 * n + i]:
                dlengths.append(torch.zeros_like(lengths[i]))
            continue
        flat = rows(grad)
        narrow = torch.empty(flat.shape, dtype=flat.dtype, device=flat.device)
        # In the lengths' precision: products of small gradients are nothing in fp16.
        product = narrow if narrow.dtype is lengths[i].dtype else narrow.new_empty(flat.shape, dtype=lengths[i].dtype)
        if needs[1 + 2 * n + i]:
            inner = rows(outputs[i])
            if biases and (bias := biases[i]) is not None:  # taken off each: of the sums only their rounding would stay
                inner = torch.sub(inner, bias.to(inner.dtype), out=product)
            total = torch.mul(flat, inner, out=product).sum(0)
            total /= lengths[i]
            if total.is_cuda:  # which would have to wait to know how many there are
                total.masked_fill_(lengths[i] == 0, 0)
            elif len(short := (lengths[i].abs() < SHORT).nonzero()[:, 0]):
                total[short] = _of_short(flat[:, short], x, hidden, weights, a, b, scales, transposed, i, short)
            dlengths.append(total)
        inner_grads.append(torch.mul(flat, lengths[i], out=narrow))
    results = lora_linear.backward(
        inner_grads, x, hidden, weights, a, b, scales, transposed, seed, p, salt, needs[: 1 + 2 * n]
    )
    return results + dlengths


def _of_short(
    grad: Tensor, x: Tensor, hidden: Tensor, weights: list[Tensor], a: list[Tensor], b: list[Tensor],
    scales: list[float], transposed: bool, i: int, short: Tensor,
) -> Tensor:  # fmt: skip
    """The gradient of some lengths, by their outputs' products, which are made again. grad is [rows, short]."""
    start = sum(A.shape[0] for A in a[:i])
    weight = weights[i][:, short] if transposed else weights[i][short].t()
    inner = rows(x) @ weight
    branch = rows(hidden)[:, start : start + a[i].shape[0]] @ b[i][short].t()
    return (grad * (inner + scales[i] * branch)).sum(0, dtype=b[i].dtype)


@dora_linear_backward.register_fake
def _(
    grads: list[Tensor | None], x: Tensor, outputs: list[Tensor], hidden: Tensor, weights: list[Tensor],
    biases: list[Tensor | None], a: list[Tensor], b: list[Tensor], lengths: list[Tensor], scales: list[float],
    transposed: bool, seed: Tensor | None, p: float, salt: int, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    learned = [x, *a, *b, *lengths]
    return [tensor.new_empty(tensor.shape) for tensor, needed in zip(learned, needs, strict=True) if needed]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, a, b, lengths, ctx.scales, ctx.transposed, seed, ctx.p, ctx.salt = inputs
    lora_linear.check_biases(biases)
    ctx.count, ctx.biased = len(weights), [bias is not None for bias in biases]
    present = [bias for bias in biases if bias is not None]
    ctx.save_for_backward(x, output[-1], seed, *output[:-1], *weights, *a, *b, *lengths, *present)
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    n, saved = ctx.count, ctx.saved_tensors
    x, hidden, seed = saved[:3]
    outputs, weights, a, b, lengths = (list(saved[3 + k * n : 3 + (k + 1) * n]) for k in range(5))
    present = iter(saved[3 + 5 * n :])
    biases = [next(present) if biased else None for biased in ctx.biased]
    needs_x, needs_weights, needs_biases, needs_a, needs_b, needs_lengths = ctx.needs_input_grad[:6]
    grads = list(gradients[:n])
    needs = [needs_x, *needs_a, *needs_b, *needs_lengths]
    results = iter(
        torch.ops.peftc.dora_linear_backward(
            grads, x, outputs, hidden, weights, biases, a, b, lengths, ctx.scales, ctx.transposed,
            seed, ctx.p, ctx.salt, needs,
        )
        if any(needs)
        else ()
    )  # fmt: skip
    dx, *rest = [next(results) if needed else None for needed in needs]
    factors = rest[:n], rest[n : 2 * n], rest[2 * n :]
    inner = [
        grad * length.to(grad.dtype) if needed and grad is not None else None
        for grad, length, needed in zip(grads, lengths, needs_weights, strict=True)
    ]
    dweights = lora_linear.weight_gradients(inner, x, ctx.transposed, needs_weights)
    dbiases = lora_linear.bias_gradients(grads, needs_biases)
    return dx, dweights, dbiases, *factors, None, None, None, None, None


dora_linear.register_autograd(_backward, setup_context=_save)
follow_autocast(dora_linear)


@register_flop_formula(torch.ops.peftc.dora_linear)
def _flops(x: Any, weights: Any, biases: Any, a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return lora_linear.flops(x, weights, a, b)


@register_flop_formula(torch.ops.peftc.dora_linear_backward)
def _backward_flops(
    grads: Any, x: Any, outputs: Any, hidden: Any, weights: Any, biases: Any, a: Any, b: Any, lengths: Any,
    scales: Any, transposed: Any, seed: Any, p: Any, salt: Any, needs: Any, *, out_shape: Any = None, **_: Any,
) -> int:  # fmt: skip
    return lora_linear.backward_flops(grads, x, weights, a, b, needs[: 1 + 2 * len(weights)])


on_cuda(dora_linear, "lora_linear", "dora_forward")
on_cuda(dora_linear_backward, "lora_backward", "dora_backward")
