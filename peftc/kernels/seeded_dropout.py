"""Dropout whose mask is a function of a seed: kept nowhere, made again where the gradient needs it.

Element i of a tensor is dropped where bits(seed, salt, i), a number of 16 bits, is below round(65536 p): p is resolved
to 1/65536, and what stays is scaled by one over the share that truly stays, so that the mean is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from peftc.kernels.common.operation import on_cuda, operation
from peftc.kernels.common.scratch import scratch
from peftc.kernels.common.shapes import like, wide

LEVELS = 1 << 16
PIECE = 1 << 18  # elements whose bits are made at a time: few calls, and what is worked on stays near a core
# An odd constant near 2³² / φ spreads the counter; the multipliers are those of Wellons' `lowbias32`.
GOLDEN, FIRST, SECOND = -1640531527, 2146121005, -2073254261


def dropped_levels(p: float) -> int:
    """How many of the 65536 values of an element's bits drop it."""
    return min(max(round(p * LEVELS), 0), LEVELS)


def kept_scale(p: float) -> float:
    """What kept elements are multiplied by: one over the share of values that keep one."""
    return LEVELS / max(LEVELS - dropped_levels(p), 1)


def keys(seed: int, salt: int) -> tuple[int, int]:
    """Two signed words of 32 bits from a seed and a salt (splitmix64, Steele 2014)."""
    state = (seed + 0x9E3779B97F4A7C15 * (salt + 1)) % (1 << 64)
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    state = (state ^ state >> 27) * 0x94D049BB133111EB % (1 << 64)
    state ^= state >> 31
    first, second = state & 0xFFFFFFFF, state >> 32
    return first - ((first >> 31) << 32), second - ((second >> 31) << 32)


def reference_bits(count: int, seed: int, salt: int) -> Tensor:
    """The bits of elements 0 … count − 1 as int16 in -32768 … 32767, word by word in 64-bit arithmetic."""
    first, second = keys(seed, salt)
    words = torch.arange((count + 1) // 2) * GOLDEN + first
    words = _signed(words)
    words = _signed((words ^ words >> 16) * FIRST + second)
    words = _signed((words ^ words >> 15) * SECOND)
    return torch.stack([_signed(words, 16), _signed(words >> 16, 16)], 1).flatten()[:count].to(torch.int16)


def _signed(words: Tensor, width: int = 32) -> Tensor:
    """The lowest bits as a signed number."""
    half = 1 << (width - 1)
    return (words + half) % (2 * half) - half


def reference(x: Tensor, seed: Tensor, p: float, salt: int) -> Tensor:
    """x / (1 − p) where an element's bits keep it, else 0.

    Args:
        x: of any shape; its elements are counted in row-major order.
        seed: int64, of no dimensions.
        p: the share that is dropped; 0 for none.
        salt: tells apart the masks that one seed makes.
    """
    bits = reference_bits(x.numel(), int(seed), salt).view(x.shape).int() + LEVELS // 2
    return torch.where(bits >= dropped_levels(p), x * kept_scale(p), torch.zeros((), dtype=x.dtype))


@lru_cache(maxsize=4)
def _counters(count: int) -> Tensor:
    """The counters of so many words, times GOLDEN."""
    with torch.inference_mode(False):
        return torch.arange(count, dtype=torch.int32).mul_(GOLDEN)


def numbers(
    count: int, seed: int, salt: int, dtype: torch.dtype, step: int = PIECE
) -> Iterator[tuple[int, int, Tensor]]:
    """The elements' bits as numbers of `dtype`, `step` at a time: where each piece starts and stops, and a buffer.

    `step` is even. The buffer is the same for all, and for the next caller in this thread. Behind a large product, with
    the caches full of something else, it is the number of calls that takes the time, more than what they do.
    """
    first, second = keys(seed, salt)
    step = max(2, min(step, count + count % 2))
    counters = _counters(step // 2)
    words, shifted = scratch("words", (step // 2,), torch.int32), scratch("shifted", (step // 2,), torch.int32)
    halves, result = words.view(torch.int16), scratch("numbers", (step,), dtype)
    for start in range(0, count, step):
        torch.add(counters, (start // 2 * GOLDEN + first + (1 << 31)) % (1 << 32) - (1 << 31), out=words)
        words.bitwise_xor_(torch.bitwise_right_shift(words, 16, out=shifted)).mul_(FIRST).add_(second)
        words.bitwise_xor_(torch.bitwise_right_shift(words, 15, out=shifted)).mul_(SECOND)
        result.copy_(halves)
        stop = min(count, start + step)
        yield start, stop, result if stop - start == step else result[: stop - start]


def keep(x: Tensor, bits: Tensor, p: float, out: Tensor) -> Tensor:
    """x where its bits keep it, else 0, not scaled; all of one shape and dtype. `out` may be any of the two."""
    threshold = dropped_levels(p) - LEVELS // 2 - 0.5
    torch.ops.aten.threshold_backward.grad_input(x, bits, threshold, grad_input=out)
    return out


@operation("seeded_dropout")
def seeded_dropout(x: Tensor, seed: Tensor, p: float, salt: int) -> Tensor:
    """The same in pieces that stay in the cache."""
    if not dropped_levels(p):
        return x.clone(memory_format=torch.contiguous_format)
    flat, result = x.reshape(-1), like(x)
    target = result.view(-1)
    for start, stop, bits in numbers(x.numel(), int(seed), salt, wide(x.dtype)):
        piece = flat[start:stop].to(bits.dtype)
        # the bits' buffer takes the result of another dtype
        kept = keep(piece, bits, p, target[start:stop] if x.dtype == bits.dtype else bits)
        torch.mul(kept, kept_scale(p), out=target[start:stop])
    return result


@seeded_dropout.register_fake
def _(x: Tensor, seed: Tensor, p: float, salt: int) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.p, ctx.salt = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (seed,) = ctx.saved_tensors
    return torch.ops.peftc.seeded_dropout(grad, seed, ctx.p, ctx.salt), None, None, None


seeded_dropout.register_autograd(_backward, setup_context=_save)

on_cuda(seeded_dropout, "seeded_dropout", "seeded_dropout")
