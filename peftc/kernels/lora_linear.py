"""Frozen linear layers that read one input, each with a low-rank branch added to its product in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import peftc.kernels.seeded_dropout as dropout
from peftc.kernels.common.operation import follow_autocast, on_cuda, operation
from peftc.kernels.common.products import add_product_, product
from peftc.kernels.common.scratch import scratch
from peftc.kernels.common.shapes import rows


def reference(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor],
    scales: Sequence[float], transposed: bool, seed: Tensor | None, p: float, salt: int,
) -> list[Tensor]:  # fmt: skip
    """[y_1 … y_n, S] with y_i = W_i x + bias_i + scale_i B_i S_i and S = [S_1 … S_n] = [A_1; …; A_n] dropout(x).

    Args:
        x: [..., n_in].
        weights: W_i, frozen: [n_out_i, n_in], or [n_in, n_out_i] where `transposed`.
        biases: [n_out_i] or None each; empty for none.
        a: A_i [r_i, n_in], of one dtype, which the branches are computed in. It may be wider than x's.
        b: B_i [n_out_i, r_i], of A's dtype.
        scales: a number each.
        seed: of `seeded_dropout` on the branches' x, or None for no dropout; with it `p` and `salt`.
    """
    inner = x.to(a[0].dtype)
    if seed is not None:
        inner = dropout.reference(inner, seed, p, salt)
    outputs, hidden = [], []
    for weight, bias, A, B, scale in zip(weights, biases or [None] * len(a), a, b, scales, strict=True):
        y = x @ (weight if transposed else weight.t())
        hidden.append(inner @ A.t())
        outputs.append((y if bias is None else y + bias) + (scale * (hidden[-1] @ B.t())).to(y.dtype))
    return [*outputs, torch.cat(hidden, -1)]


def accumulate_(y: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """y += scale * left @ right, in the factors' dtype and without a temporary of y's size if that is y's too."""
    if y.dtype == left.dtype:
        return y.addmm_(left, right, alpha=scale)
    added = left @ right
    if y.is_cuda:  # whose kernels cast as they read
        return y.add_(added, alpha=scale)
    return y.add_((added if scale == 1 else added.mul_(scale)).to(y.dtype))


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))


def _dropped_pieces(
    count: int, n_in: int, dtype: torch.dtype, seed: Tensor, p: float, salt: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of a [count, n_in] mask: which, their bits, and room for as many numbers. Enough rows for a product."""
    pieces = -(-count * n_in // dropout.PIECE)
    height = -(-count // max(pieces, 1))
    height += height % 2
    room = scratch("dropped", (height, n_in), dtype)
    for start, stop, bits in dropout.numbers(count * n_in, int(seed), salt, dtype, height * n_in):
        part = slice(start // n_in, stop // n_in)
        yield part, bits.view(-1, n_in), room[: part.stop - part.start]


def _hidden(x: Tensor, a: Tensor, seed: Tensor | None, p: float, salt: int) -> Tensor:
    """S = dropout(x) Aᵀ [rows, r]; what is kept is scaled where it is narrow."""
    if seed is None or not dropout.dropped_levels(p):
        return product(x.to(a.dtype), a.t())
    if x.is_cuda:
        kept: Tensor = torch.ops.peftc.seeded_dropout(x.to(a.dtype), seed, p, salt)
        return kept @ a.t()
    hidden = x.new_empty(x.shape[0], a.shape[0], dtype=a.dtype)
    for part, bits, _ in _dropped_pieces(x.shape[0], x.shape[1], a.dtype, seed, p, salt):
        torch.mm(dropout.keep(x[part].to(a.dtype), bits, p, bits), a.t(), out=hidden[part])
    return hidden.mul_(dropout.kept_scale(p))


@operation("lora_linear")
def lora_linear(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], a: list[Tensor], b: list[Tensor],
    scales: list[float], transposed: bool, seed: Tensor | None, p: float, salt: int,
) -> list[Tensor]:  # fmt: skip
    return forward(x, weights, biases, a, b, scales, transposed, seed, p, salt)


def forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor],
    scales: Sequence[float], transposed: bool, seed: Tensor | None, p: float, salt: int,
) -> list[Tensor]:  # fmt: skip
    """The same with one product for all A's, and B's products accumulated into the base's."""
    flat = rows(x)
    hidden = _hidden(flat, _stacked(a), seed, p, salt)
    outputs, start = [], 0
    for i, weight in enumerate(weights):
        columns = weight if transposed else weight.t()
        bias = biases[i] if biases else None
        y = product(flat, columns, bias)
        stop = start + a[i].shape[0]
        accumulate_(y, hidden[:, start:stop], b[i].t(), scales[i])
        outputs.append(y.view(*x.shape[:-1], y.shape[1]))
        start = stop
    return [*outputs, hidden.view(*x.shape[:-1], start)]


@lora_linear.register_fake
def _(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], a: list[Tensor], b: list[Tensor],
    scales: list[float], transposed: bool, seed: Tensor | None, p: float, salt: int,
) -> list[Tensor]:  # fmt: skip
    return shapes(x, weights, biases, a, b, scales)


def shapes(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    """The outputs without their values. Raises ValueError where the lists do not belong together."""
    n = len(weights)
    if not (n == len(a) == len(b) == len(scales)) or len(biases) not in (0, n):
        raise ValueError("a group takes as many weights as a's, b's and scales, and as many biases or none")
    outputs = [x.new_empty((*x.shape[:-1], B.shape[0])) for B in b]
    return [*outputs, x.new_empty((*x.shape[:-1], sum(A.shape[0] for A in a)), dtype=a[0].dtype)]


@operation("lora_linear_backward")
def lora_linear_backward(
    grads: list[Tensor | None], x: Tensor, hidden: Tensor, weights: list[Tensor], a: list[Tensor], b: list[Tensor],
    scales: list[float], transposed: bool, seed: Tensor | None, p: float, salt: int, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    return backward(grads, x, hidden, weights, a, b, scales, transposed, seed, p, salt, needs)


def backward(
    grads: Sequence[Tensor | None], x: Tensor, hidden: Tensor, weights: Sequence[Tensor], a: Sequence[Tensor],
    b: Sequence[Tensor], scales: Sequence[float], transposed: bool, seed: Tensor | None, p: float, salt: int,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Those of [dx, dA_1 … dA_n, dB_1 … dB_n] whose entry in `needs` is set; dx is one buffer summed in place."""
    n = len(weights)
    flat_grads = [None if grad is None else rows(grad) for grad in grads]
    hidden = rows(hidden)
    dhidden = hidden.new_empty(hidden.shape)
    pieces = [slice(sum(A.shape[0] for A in a[:i]), sum(A.shape[0] for A in a[: i + 1])) for i in range(n)]
    factors = []  # each beside S's part: both read the gradient in B's precision, which is made once
    for i, (grad, B, scale, piece) in enumerate(zip(flat_grads, b, scales, pieces, strict=True)):
        exact = None if grad is None else grad.to(B.dtype)
        if exact is None:
            dhidden[:, piece] = 0
        elif exact.is_cuda:
            dhidden[:, piece].addmm_(exact, B, beta=0, alpha=scale)
        else:
            torch.mul(product(exact, B), scale, out=dhidden[:, piece])
        if needs[1 + n + i]:
            factors.append(_output_factor_gradient(exact, hidden[:, piece], B, scale))
    needs_a = any(needs[1 : 1 + n])
    dx = _base_gradient(flat_grads, x, weights, transposed) if needs[0] else None
    stacked = _stacked(a)
    together = _branch_gradients(dx, rows(x) if needs_a else None, dhidden, stacked, seed, p, salt)
    results = [] if dx is None else [dx.view(x.shape)]
    if together is not None:
        results += [together[pieces[i]].clone() if n > 1 else together for i in range(n) if needs[1 + i]]
    return results + factors


def _base_gradient(
    grads: Sequence[Tensor | None], x: Tensor, weights: Sequence[Tensor], transposed: bool
) -> Tensor:  # fmt: skip
    """Σ dy_i W_i [rows, n_in], in one buffer."""
    dx: Tensor | None = None
    for grad, weight in zip(grads, weights, strict=True):
        if grad is not None:
            matrix = weight.t() if transposed else weight
            dx = product(grad, matrix) if dx is None else add_product_(dx, grad, matrix)
    return rows(x).new_zeros(rows(x).shape) if dx is None else dx


def _branch_gradients(
    dx: Tensor | None, x: Tensor | None, dhidden: Tensor, a: Tensor, seed: Tensor | None, p: float, salt: int
) -> Tensor | None:
    """Adds the branches' part to dx and returns dA, where x is given; both under one mask."""
    if seed is None or not dropout.dropped_levels(p):
        if dx is not None:
            accumulate_(dx, dhidden, a)
        if x is None:
            return None
        left = dhidden.t()
        return product(left if left.is_cuda else left.contiguous(), x.to(a.dtype))
    if a.is_cuda:
        return _branch_gradients_on_cuda(dx, x, dhidden, a, seed, p, salt)
    dhidden = dhidden * dropout.kept_scale(p)
    da = None if x is None else torch.zeros_like(a, memory_format=torch.contiguous_format)
    if dx is None and da is None:
        return None
    for part, bits, room in _dropped_pieces(dhidden.shape[0], a.shape[1], a.dtype, seed, p, salt):
        if x is not None and da is not None:
            da.addmm_(dhidden[part].t(), dropout.keep(x[part].to(a.dtype), bits, p, room))
        if dx is not None:
            dx[part] += dropout.keep(torch.mm(dhidden[part], a, out=room), bits, p, bits)
    return da


def _branch_gradients_on_cuda(
    dx: Tensor | None, x: Tensor | None, dhidden: Tensor, a: Tensor, seed: Tensor, p: float, salt: int
) -> Tensor | None:
    from peftc.kernels.gpu import lora_backward as gpu

    if dx is not None:
        gpu.add_input_gradient_(dx, dhidden, a, seed, p, salt)
    if x is None:
        return None
    kept: Tensor = torch.ops.peftc.seeded_dropout(x.to(a.dtype), seed, p, salt)
    return dhidden.t() @ kept


def _output_factor_gradient(grad: Tensor | None, hidden: Tensor, b: Tensor, scale: float) -> Tensor:
    """dB = scale * gradᵀ S: the product that has the long side last is the faster one, and turning dB is cheap."""
    if grad is None:
        return torch.zeros_like(b, memory_format=torch.contiguous_format)
    if grad.is_cuda:  # which multiplies whatever is turned
        return torch.addmm(b, grad.t(), hidden, beta=0, alpha=scale)
    return product((hidden * scale).t().contiguous(), grad).t().contiguous()


@lora_linear_backward.register_fake
def _(
    grads: list[Tensor | None], x: Tensor, hidden: Tensor, weights: list[Tensor], a: list[Tensor], b: list[Tensor],
    scales: list[float], transposed: bool, seed: Tensor | None, p: float, salt: int, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    return [tensor.new_empty(tensor.shape) for tensor, needed in zip([x, *a, *b], needs, strict=True) if needed]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, a, b, ctx.scales, ctx.transposed, seed, ctx.p, ctx.salt = inputs
    check_biases(biases)
    ctx.count = len(weights)
    ctx.save_for_backward(x, output[-1], seed, *weights, *a, *b)
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    n, saved = ctx.count, ctx.saved_tensors
    x, hidden, seed = saved[:3]
    weights, a, b = (list(saved[3 + k * n : 3 + (k + 1) * n]) for k in range(3))
    grads = list(gradients[:n])
    needs_x, needs_weights, needs_biases, needs_a, needs_b = ctx.needs_input_grad[:5]
    needs = [needs_x, *needs_a, *needs_b]
    results = iter(
        torch.ops.peftc.lora_linear_backward(
            grads, x, hidden, weights, a, b, ctx.scales, ctx.transposed, seed, ctx.p, ctx.salt, needs
        )
        if any(needs)
        else ()
    )
    dx, *factors = [next(results) if needed else None for needed in needs]
    dweights = weight_gradients(grads, x, ctx.transposed, needs_weights)
    dbiases = bias_gradients(grads, needs_biases)
    return dx, dweights, dbiases, factors[:n], factors[n:], None, None, None, None, None


def check_biases(biases: Sequence[Tensor | None]) -> None:
    """torch takes no gradients for a list in which some are None; the fusions make no such list."""
    if None in biases and any(bias is not None and bias.requires_grad for bias in biases):
        raise NotImplementedError("gradients of biases need a bias at every weight of the group")


def weight_gradients(
    grads: Sequence[Tensor | None], x: Tensor, transposed: bool, needs: Sequence[bool]
) -> list[Tensor | None]:  # fmt: skip
    """dW_i of base weights that were unfrozen behind the compiler's back: those it knows of it leaves unfused."""
    return [
        None if grad is None or not needed
        else rows(x).t() @ rows(grad) if transposed
        else rows(grad).t() @ rows(x)
        for grad, needed in zip(grads, needs, strict=True)
    ]  # fmt: skip


def bias_gradients(grads: Sequence[Tensor | None], needs: Any) -> list[Tensor | None] | None:
    """The same of biases; `needs` is no list where some layers have none."""
    if not isinstance(needs, list):
        return None
    return [
        rows(grad).sum(0) if needed and grad is not None else None
        for grad, needed in zip(grads, needs, strict=False)
    ]  # fmt: skip


lora_linear.register_autograd(_backward, setup_context=_save)
follow_autocast(lora_linear)


@register_flop_formula(torch.ops.peftc.lora_linear)
def _flops(x: Any, weights: Any, biases: Any, a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return flops(x, weights, a, b)


@register_flop_formula(torch.ops.peftc.lora_linear_backward)
def _backward_flops(
    grads: Any, x: Any, hidden: Any, weights: Any, a: Any, b: Any, scales: Any, transposed: Any, seed: Any, p: Any,
    salt: Any, needs: Any, *, out_shape: Any = None, **_: Any,
) -> int:  # fmt: skip
    return backward_flops(grads, x, weights, a, b, needs)


Shapes = Sequence[Sequence[int]]


def flops(x: Sequence[int], weights: Shapes, a: Shapes, b: Shapes) -> int:
    """Of the forward pass, from the shapes."""
    return 2 * prod(x[:-1]) * sum(shape[0] * shape[1] for shape in (*weights, *a, *b))


def backward_flops(
    grads: Sequence[Sequence[int] | None], x: Sequence[int], weights: Shapes, a: Shapes, b: Shapes,
    needs: Sequence[bool],
) -> int:  # fmt: skip
    """Of the backward pass: the gradient of S always, those of x and of the factors where they are needed."""
    used = [i for i, grad in enumerate(grads) if grad is not None]
    products = [b[i] for i in used]
    if needs[0]:
        products += [*(weights[i] for i in used), *a]
    products += [shape for shape, needed in zip((*a, *b), needs[1:], strict=True) if needed]
    return 2 * prod(x[:-1]) * sum(shape[0] * shape[1] for shape in products)


on_cuda(lora_linear, "lora_linear", "forward")
on_cuda(lora_linear_backward, "lora_backward", "backward")
