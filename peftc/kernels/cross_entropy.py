"""A frozen linear head and the cross-entropy of its logits, a chunk of tokens at a time: all logits never exist.

The gradient of the hidden states is made beside the loss, while a chunk's logits are at hand (Liger Kernel's idea,
arXiv:2410.10989); what is saved for the backward is that gradient alone. Tokens whose label is `ignore_index` cost
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from peftc.kernels.common.operation import autocast_dtype, first_derivative, operation
from peftc.kernels.common.products import product
from peftc.kernels.common.shapes import wide

ON_CUDA = 512  # tokens a chunk, at least: each reads the head's weight, whose products are to last longer than that


def reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Σ over tokens of −log softmax(W h + bias)[label], in fp32 at least, and how many tokens it sums over.

    Args:
        hidden: [N, d].
        weight: [V, d].
        bias: [V] or None.
        labels: [N] int64, in 0 … V − 1 or `ignore_index`.
        chunk: how many tokens' logits are made at a time.
    """
    logits = F.linear(hidden, weight, bias).to(wide(hidden.dtype))
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum"), (labels != ignore_index).sum()


def _with_label(hidden: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tokens that count, their labels, and where they are: None for everywhere."""
    keep = labels != ignore_index
    if bool(keep.all()):
        return hidden, labels, None
    index = keep.nonzero()[:, 0]
    return hidden.index_select(0, index), labels.index_select(0, index), index


def _chunk(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, dhidden: Tensor | None) -> Tensor:
    """The loss of a few tokens, and their gradient in `dhidden` if it is given.

    The gradient is (softmax − onehot) W. The exponentials are divided by their sum on the way out, where there are d
    numbers a token and not V.
    """
    logits = product(hidden, weight.t(), bias)
    exact = logits.to(wide(logits.dtype))
    labels = labels[:, None]
    top = exact.amax(-1, keepdim=True)
    loss = top - exact.gather(1, labels)
    exponentials = exact.sub_(top).exp_()
    total = exponentials.sum(-1, keepdim=True)
    if dhidden is not None:
        exponentials.scatter_add_(1, labels, -total)
        if exponentials.dtype == hidden.dtype:
            product(exponentials, weight, out=dhidden).div_(total)
        else:  # a sum of many exponentials is more than fp16 holds
            product(exponentials.div_(total).to(hidden.dtype), weight, out=dhidden)
    return (loss + total.log_()).sum()


def _run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, chunk: int,
    dhidden: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss and the count; the gradient is written to `dhidden` if there is one."""
    if hidden.is_cuda:
        chunk = max(chunk, ON_CUDA)
    used, targets, index = _with_label(hidden, labels, ignore_index)
    gradient = dhidden if dhidden is None or index is None else torch.empty_like(used)
    loss = hidden.new_zeros((), dtype=wide(hidden.dtype))
    for start in range(0, used.shape[0], chunk):
        part = slice(start, min(start + chunk, used.shape[0]))
        piece = None if gradient is None else gradient[part]
        loss += _chunk(used[part], weight, bias, targets[part], piece)
    if dhidden is not None and gradient is not None and index is not None:
        dhidden.zero_().index_copy_(0, index, gradient)
    return loss, labels.new_tensor(used.shape[0])


@operation("cross_entropy_alone", ("cpu", "cuda"))
def cross_entropy_alone(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Where no gradient is asked for."""
    return _run(hidden, weight, bias, labels, ignore_index, chunk, None)


@cross_entropy_alone.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty((), dtype=wide(hidden.dtype)), labels.new_empty(())


@operation("cross_entropy_with_gradient", ("cpu", "cuda"))
def cross_entropy_with_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the count, and the loss's gradient with respect to the hidden states."""
    dhidden = hidden.new_empty(hidden.shape)
    return *_run(hidden, weight, bias, labels, ignore_index, chunk, dhidden), dhidden


@cross_entropy_with_gradient.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=wide(hidden.dtype))
    return loss, labels.new_empty(()), hidden.new_empty(hidden.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    count, dhidden = ctx.saved_tensors
    if grad is None:
        return (None,) * 6
    first_derivative()
    # The mean over no tokens is 0 / 0; its gradient is none, as that of torch's own mean.
    return dhidden * grad.masked_fill(count == 0, 0).to(dhidden.dtype), None, None, None, None, None


cross_entropy_with_gradient.register_autograd(_backward, setup_context=_save)

LIBRARY = torch.library.Library("peftc", "FRAGMENT")
LIBRARY.define(
    "cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, int chunk)"
    " -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(LIBRARY, "cross_entropy", "CompositeImplicitAutograd")
def cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """The same; the gradient is made beside the loss only where one is asked for.

    A head that was unfrozen behind the compiler's back has the definition's gradients, and costs all logits.
    """
    if (dtype := autocast_dtype(hidden.device.type)) is not None:
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return reference(hidden, weight, bias, labels, ignore_index, chunk)
    if torch.is_grad_enabled() and hidden.requires_grad:
        loss, count, _ = torch.ops.peftc.cross_entropy_with_gradient(hidden, weight, bias, labels, ignore_index, chunk)
        return loss, count
    loss, count = torch.ops.peftc.cross_entropy_alone(hidden, weight, bias, labels, ignore_index, chunk)
    return loss, count


@register_flop_formula(torch.ops.peftc.cross_entropy_alone)
def _flops(hidden: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * hidden[0] * hidden[1] * weight[0]


@register_flop_formula(torch.ops.peftc.cross_entropy_with_gradient)
def _gradient_flops(hidden: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 4 * hidden[0] * hidden[1] * weight[0]
