"""Packed weights -> dense ones, one operation each, so that a plan can have it done again in the backward pass.

Frozen: there is no gradient. The results are those of bitsandbytes' definitions, bit for bit. bitsandbytes' own decoder
for the CPU is not used: it is wrong for weights of fewer columns than a block (0.50.2). On one thread these take some
five per cent of the time of the product with 256 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor

NESTED_BLOCK = 256
INT8_STEP = 7.874015718698502e-3  # 1/127
# Packed bytes that are decoded at a time: index, pairs and result stay in a core's cache.
CHUNK = 1 << 15

LEVELS = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # a twelfth of each: sign, two bits of exponent, one of mantissa
    "fp4": (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, -0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0),
}  # fmt: skip


@cache
def levels_of(name: str, device: torch.device) -> Tensor:
    """The sixteen levels by code, fp32, the largest 1."""
    levels = torch.tensor(LEVELS[name], device=device)
    return levels / levels.abs().max()


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """256 fp32 numbers in [-1, 1], ascending: the fewer bits the exponent leaves, the coarser the fraction.

    Dettmers et al. 2021, arXiv:2110.02861.
    """
    numbers = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        middles = (bounds[:-1] + bounds[1:]) / 2
        for sign in (1, -1):
            numbers += (sign * 10 ** (exponent - 6) * middles).tolist()
    return torch.tensor(sorted(numbers), dtype=torch.float32, device=device)


@cache
def _pairs(name: str, device: torch.device) -> Tensor:
    """Both levels of each byte, [256], two fp32 in the bits of an int64: one look-up decodes two numbers."""
    levels = levels_of(name, device)
    both = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)
    return both.contiguous().view(torch.int64).flatten()


@torch.library.custom_op("peftc::dequantize_4bit", mutates_args=())
def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    levels: str,
    block: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """levels[code] * absmax of the code's block in fp32, as `dtype`.

    Args:
        packed: uint8 [ceil(N / 2), 1], two codes each, the first in the high bits.
        absmax: fp32 [ceil(N / block)]; uint8 where it is quantised itself.
        nested_absmax: fp32 [ceil(blocks / 256)], the scales of absmax, or None.
        offset: fp32 [], what is added to absmax, or None.
        levels: a key of `LEVELS`.
        block: how many numbers have a scale in common; even.
        shape: of the result, of N numbers.
        dtype: of the result.
    """
    scales = absmax.float()
    if nested_absmax is not None and offset is not None:
        scales = dynamic_map(absmax.device).index_select(0, absmax.int())
        scales = _scaled(scales, nested_absmax.float(), NESTED_BLOCK) + offset
    pairs, codes, numbers = _pairs(levels, packed.device), packed.flatten(), prod(shape)
    whole = torch.empty(2 * len(codes), dtype=dtype, device=packed.device)
    step = CHUNK // block * block
    for start in range(0, len(codes), step):
        two = pairs.index_select(0, codes[start : start + step].int()).view(torch.float32)
        first = 2 * start // block
        whole[2 * start : 2 * start + len(two)] = _scaled(two, scales[first : first + 2 * step // block], block)
    return whole[:numbers].clone().view(shape) if numbers % 2 else whole.view(shape)


def _scaled(numbers: Tensor, scales: Tensor, block: int) -> Tensor:
    """Each block of `numbers` times its scale, in place; the last block may be shorter."""
    whole = len(numbers) // block
    numbers[: whole * block].view(-1, block).mul_(scales[:whole, None])
    if len(numbers) % block:
        numbers[whole * block :].mul_(scales[whole])
    return numbers


@dequantize_4bit.register_fake
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    levels: str,
    block: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


@torch.library.custom_op("peftc::dequantize_int8", mutates_args=())
def dequantize_int8(values: Tensor, scale: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """values * scale / 127 in fp32, as `dtype`.

    Args:
        values: int8 [rows, n_in].
        scale: fp32 [rows], each row's largest magnitude.
        shape: of the result, [*batch, n_out, n_in].
        dtype: of the result.
    """
    whole = torch.empty(values.shape, dtype=dtype, device=values.device)
    step = max(1, CHUNK // values.shape[1])
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        whole[rows] = (values[rows] * scale[rows, None]).mul_(INT8_STEP)
    return whole.view(shape)


@dequantize_int8.register_fake
def _(values: Tensor, scale: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return values.new_empty(shape, dtype=dtype)
