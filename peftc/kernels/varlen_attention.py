"""Attention of several texts in a row, each to itself: over their bounds, never over a mask of all tokens by all.

    y_i = sum_j softmax_j(scale q_i k_j) v_j,   j in i's own text, j <= i if causal, j > i - window if there is one

`text_bounds` finds the bounds once for all attentions. A text ends where the next position is not one more, and at the
end of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from peftc.kernels.common.operation import follow_autocast, on_cuda, operation
from peftc.kernels.common.shapes import wide

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@operation("text_bounds", device_types=("cpu", "cuda"))
def text_bounds(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Where the texts of rows begin.

    Args:
        positions: integers [batch, tokens].

    Returns:
        Bounds, int32 [batch * tokens + 1]: the first token of each text, the rows counted on, then the number of all
        tokens until the end; and on the CPU, where the sizes of what is launched are chosen, int64 [2]: how many texts
        there are, and the length of the longest.
    """
    total = positions.numel()
    first = torch.ones_like(positions, dtype=torch.bool)
    torch.ne(positions[:, 1:], positions[:, :-1] + 1, out=first[:, 1:])
    starts = first.flatten().nonzero().flatten()
    bounds = torch.full((total + 1,), total, dtype=torch.int32, device=positions.device)
    bounds[: len(starts)] = starts
    counts = torch.zeros(2, dtype=torch.int64)
    if total:
        counts[0] = len(starts)
        counts[1] = bounds[: len(starts) + 1].diff().max()
    return bounds, counts


@text_bounds.register_fake
def _(positions: Tensor) -> tuple[Tensor, Tensor]:
    bounds = positions.new_empty((positions.shape[0] * positions.shape[1] + 1,), dtype=torch.int32)
    return bounds, torch.empty(2, dtype=torch.int64, device="cpu")


class Text(NamedTuple):
    """One text: its row of the batch, and its tokens there."""

    row: int
    start: int
    stop: int


def texts(bounds: Tensor, counts: Tensor, length: int) -> Iterator[Text]:
    """The texts of rows of so many tokens."""
    ends = bounds[: int(counts[0]) + 1].tolist()
    for start, stop in pairwise(ends):
        row = start // length
        yield Text(row, start - row * length, stop - row * length)


def hidden(length: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Which keys of its own text a query does not see, bool [length, length]."""
    all_pairs = torch.ones(length, length, dtype=torch.bool, device=device)
    unseen = all_pairs.triu(1) if causal else ~all_pairs
    return unseen if window is None else unseen | all_pairs.tril(-window)


def reference(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, counts: Tensor, scale: float, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    """The definition, text by text, and the logarithm of each softmax's denominator.

    Args:
        q: [batch, heads, tokens, width].
        k: [batch, key heads, tokens, width]; as many queries' heads in a row share one as there are more of them.
        v: [batch, key heads, tokens, width].
        bounds: of `text_bounds`.
        counts: of `text_bounds`.
        scale: of the products of queries and keys.
        causal: whether a token sees none behind it.
        window: how many tokens one sees at most, itself included; all if None. A window is causal.

    Returns:
        [batch, heads, tokens, width] and [batch, heads, tokens], in fp32 at least.
    """
    y, lse = _results(q, v)
    for row, start, stop in texts(bounds, counts, q.shape[2]):
        queries, keys, values = (_text(item, k.shape[1], row, start, stop) for item in (q, k, v))
        scores = _scores(queries, keys, scale, causal, window)
        total = scores.logsumexp(-1)
        lse[row, :, start:stop] = total.flatten(0, 1)
        y[row, :, start:stop] = ((scores - total[..., None]).exp() @ values.to(scores.dtype)).flatten(0, 1).to(y.dtype)
    return y, lse


def reference_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, bounds: Tensor, counts: Tensor,
    scale: float, causal: bool, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """With P the softmax, dv = P' grad, dS = P (grad v' - grad y), dq = scale dS k, dk = scale dS' q."""
    dq, dk, dv = map(_room, (q, k, v))
    for row, start, stop in texts(bounds, counts, q.shape[2]):
        place = (row, slice(None), slice(start, stop))
        queries, keys, values = (_text(item, k.shape[1], row, start, stop).to(lse.dtype) for item in (q, k, v))
        coming, result = (_text(item, k.shape[1], row, start, stop).to(lse.dtype) for item in (grad, y))
        scores = _scores(queries, keys, scale, causal, window)
        share = (scores - lse[place].unflatten(0, (k.shape[1], -1))[..., None]).exp()
        dv[place] = (share.mT @ coming).sum(1).to(dv.dtype)
        dscores = share * (coming @ values.mT - (coming * result).sum(-1, keepdim=True)) * scale
        dq[place] = (dscores @ keys).flatten(0, 1).to(dq.dtype)
        dk[place] = (dscores.mT @ queries).sum(1).to(dk.dtype)
    return dq, dk, dv


def _scores(queries: Tensor, keys: Tensor, scale: float, causal: bool, window: int | None) -> Tensor:
    dtype = wide(queries.dtype)
    unseen = hidden(queries.shape[-2], causal, window, queries.device)
    return (queries.to(dtype) @ keys.to(dtype).mT * scale).masked_fill(unseen, float("-inf"))


def _text(item: Tensor, shared: int, row: int, start: int, stop: int) -> Tensor:
    """One text's part of an operand, nothing copied: [key heads, heads of queries that share one, tokens, width]."""
    part: Tensor = item[row, :, start:stop].unflatten(0, (shared, -1))
    return part


def _room(like: Tensor) -> Tensor:
    """For a value of the shape of `like`, the heads of a token side by side: so products read them next."""
    batch, heads, tokens, width = like.shape
    return like.new_empty((batch, tokens, heads, width)).transpose(1, 2)


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = q.shape
    y = q.new_empty((batch, tokens, heads, v.shape[-1])).transpose(1, 2)
    return y, q.new_empty((batch, heads, tokens), dtype=wide(q.dtype))


class _Seen:
    """How a text's keys are hidden, for the operation of one text: a flag, or a mask, of each length once."""

    def __init__(self, like: Tensor, causal: bool, window: int | None) -> None:
        self.like, self.causal, self.window = like, causal, window
        self.masks: dict[int, Tensor] = {}

    def __call__(self, length: int) -> tuple[bool, Tensor | None]:
        if self.window is None or length <= self.window:
            return self.causal, None
        if length not in self.masks:
            unseen = hidden(length, self.causal, self.window, self.like.device)
            self.masks[length] = self.like.new_zeros(length, length).masked_fill_(unseen, float("-inf"))
        return False, self.masks[length]


@operation("varlen_attention")
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, counts: Tensor, scale: float, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    """The same, each text by the attention that PyTorch has for one; its heads read the keys they share in place."""
    if not _has_flash(q, v):
        return reference(q, k, v, bounds, counts, scale, causal, window)
    y, lse = _results(q, v)
    seen, shared = _Seen(q, causal, window), k.shape[1]
    for row, start, stop in texts(bounds, counts, q.shape[2]):
        flag, mask = seen(stop - start)
        queries, keys, values = _spread(_text(item, shared, row, start, stop) for item in (q, k, v))
        part, total = FLASH(queries, keys, values, 0.0, flag, attn_mask=mask, scale=scale)
        y[row, :, start:stop] = part.flatten(0, 1)
        lse[row, :, start:stop] = total.flatten(0, 1)
    return y, lse


@varlen_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, counts: Tensor, scale: float, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    return _results(q, v)


@operation("varlen_attention_backward")
def varlen_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, bounds: Tensor, counts: Tensor,
    scale: float, causal: bool, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, text by text."""
    if not _has_flash(q, v):
        return reference_backward(grad, q, k, v, y, lse, bounds, counts, scale, causal, window)
    dq, dk, dv = map(_room, (q, k, v))
    seen, shared = _Seen(q, causal, window), k.shape[1]
    for row, start, stop in texts(bounds, counts, q.shape[2]):
        place = (row, slice(None), slice(start, stop))
        flag, mask = seen(stop - start)
        given = _spread(_text(item, shared, row, start, stop) for item in (q, k, v))
        coming, result, total = (item[place].unflatten(0, (shared, -1)) for item in (grad, y, lse))
        parts = FLASH_BACKWARD(coming, *given, result, total, 0.0, flag, attn_mask=mask, scale=scale)
        dq[place] = parts[0].flatten(0, 1)
        for whole, part in ((dk, parts[1]), (dv, parts[2])):
            if part.shape[1] == 1:
                whole[place] = part[:, 0]
            else:
                torch.sum(part, 1, out=whole[place])
    return dq, dk, dv


@varlen_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, bounds: Tensor, counts: Tensor,
    scale: float, causal: bool, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _room(q), _room(k), _room(v)


def _has_flash(q: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's attention for CPUs takes such operands."""
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


def _spread(operands: Iterator[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values for each head of the queries, all that share one at one place in memory."""
    queries, keys, values = operands
    shape = queries.shape
    return queries, keys.expand(shape), values.expand(*shape[:-1], -1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, counts, ctx.scale, ctx.causal, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, bounds, counts)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    rest = (None,) * 5
    if grad is None:
        return None, None, None, *rest
    found = torch.ops.peftc.varlen_attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.causal, ctx.window)
    return *found, *rest


varlen_attention.register_autograd(_backward, setup_context=_save)

follow_autocast(varlen_attention)
on_cuda(varlen_attention, "varlen_attention", "forward")
on_cuda(varlen_attention_backward, "varlen_attention", "backward")


@register_flop_formula(torch.ops.peftc.varlen_attention, get_raw=True)
def _flops(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, counts: Tensor, *_: Any, **__: Any) -> int:
    """q k' and its product with v, of each text with itself; without numbers as if each row were one."""
    return 2 * q.shape[1] * (q.shape[-1] + v.shape[-1]) * _pairs(q, bounds, counts)


@register_flop_formula(torch.ops.peftc.varlen_attention_backward, get_raw=True)
def _flops_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, bounds: Tensor, counts: Tensor, *_: Any,
    **__: Any,
) -> int:  # fmt: skip
    """q k' again, and two products for each of the forward pass's two."""
    return 2 * q.shape[1] * (3 * q.shape[-1] + 2 * v.shape[-1]) * _pairs(q, bounds, counts)


def _pairs(q: Tensor, bounds: Tensor, counts: Tensor) -> int:
    """Pairs of tokens of one text; as with other attentions, hidden ones count."""
    if isinstance(counts, FakeTensor) or counts.is_meta:
        return int(q.shape[0] * q.shape[2] ** 2)
    return sum((stop - start) ** 2 for _, start, stop in texts(bounds, counts, q.shape[2]))
