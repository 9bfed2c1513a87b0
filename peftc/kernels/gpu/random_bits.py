"""The bits of `seeded_dropout` in Triton: the same words from the same counters as on the CPU."""

from __future__ import annotations

import triton
from triton import language as tl

import peftc.kernels.seeded_dropout as seeded_dropout

GOLDEN = tl.constexpr(seeded_dropout.GOLDEN)
FIRST = tl.constexpr(seeded_dropout.FIRST)
SECOND = tl.constexpr(seeded_dropout.SECOND)


@triton.jit
def word_keys(seed, salt):
    """Both keys, int32, from a pointer to the seed and a salt: splitmix64."""
    state = tl.load(seed).to(tl.uint64)
    state += 0x9E3779B97F4A7C15 * (salt + 1).to(tl.uint64)
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    state = state ^ (state >> 31)
    first = (state & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    second = (state >> 32).to(tl.uint32).to(tl.int32, bitcast=True)
    return first, second


@triton.jit
def keeps(index, first, second, threshold):
    """Whether elements are kept, by their places: `threshold` of 65536 values drop one."""
    words = (index >> 1).to(tl.int32) * GOLDEN + first
    words = (words ^ (words >> 16)) * FIRST + second
    words = (words ^ (words >> 15)) * SECOND
    bits = (words >> ((index & 1) * 16).to(tl.int32)) & 0xFFFF
    return (bits ^ 0x8000) >= threshold
