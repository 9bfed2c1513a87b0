"""Packed weights -> dense ones, one operation each, so that a plan can have it done again in the backward pass.

Frozen: there is no gradient. The results are those of bitsandbytes' definitions, bit for bit. Its own decoder for the
CPU is three to ten times as fast, and wrong where a row is no whole number of blocks (0.50.2): it is taken elsewhere,
where it is found to give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from math import prod

import torch
from torch import Tensor

from peftc.kernels.common.decoder import Decode, decoder
from peftc.kernels.common.operation import runs

NESTED_BLOCK = 256
INT8_STEP = 7.874015718698502e-3  # 1/127
# Packed bytes, and numbers of eight bits, that are decoded at a time: what that takes stays in a core's cache.
CHUNK, NUMBERS = 1 << 17, 1 << 20

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


torch.library.define(
    "peftc::dequantize_4bit",
    "(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset, str levels, int block, SymInt[] shape, "
    "ScalarType dtype) -> Tensor",
)
torch.library.define(
    "peftc::dequantize_int8", "(Tensor values, Tensor scale, SymInt[] shape, ScalarType dtype) -> Tensor"
)


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
        block: how many numbers have a scale in common; a multiple of two.
        shape: of the result, of N numbers.
        dtype: of the result.
    """
    dense: Tensor = torch.ops.peftc.dequantize_4bit(packed, absmax, nested_absmax, offset, levels, block, shape, dtype)
    return dense


def dequantize_int8(values: Tensor, scale: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """values * scale / 127 in fp32, as `dtype`.

    Args:
        values: int8 [rows, n_in].
        scale: fp32 [rows], each row's largest magnitude.
        shape: of the result, [*batch, n_out, n_in].
        dtype: of the result.
    """
    dense: Tensor = torch.ops.peftc.dequantize_int8(values, scale, shape, dtype)
    return dense


def scales_of(absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None) -> Tensor:
    """The scale of each block, fp32, of what `dequantize_4bit` is given."""
    if nested_absmax is None or offset is None:
        return absmax.float()
    scales = dynamic_map(absmax.device).index_select(0, absmax.int())
    _scale(scales, nested_absmax.float(), NESTED_BLOCK)
    return scales.add_(offset)


def _four_bits(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    levels: str,
    block: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return decoded(packed, scales_of(absmax, nested_absmax, offset), levels, block, shape, dtype)


def decoded(
    packed: Tensor, scales: Tensor, levels: str, block: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """`dequantize_4bit` with the scales of `scales_of`, not through the dispatcher: where no autograd is needed."""
    plain = _plain_decoder(levels, block, dtype)
    if packed.device.type == "cpu" and shape[-1] % block == 0:
        sooner = decoder(levels, block, dtype, plain)
        return (sooner or plain)(packed, scales, shape)
    return plain(packed, scales, shape)


@cache
def _plain_decoder(levels: str, block: int, dtype: torch.dtype) -> Decode:
    return partial(_decode, levels, block, dtype)


def _decode(
    levels: str, block: int, dtype: torch.dtype, packed: Tensor, scales: Tensor, shape: Sequence[int]
) -> Tensor:
    """What `dequantize_4bit` does, with scales in fp32."""
    pairs, codes, numbers = _pairs(levels, packed.device), packed.view(-1), prod(shape)
    whole = torch.empty(2 * len(codes), dtype=dtype, device=packed.device)
    step = max(CHUNK // block, 1) * block  # packed bytes: two numbers each, so whole blocks
    for start in range(0, len(codes), step):
        part = whole[2 * start : 2 * (start + step)]
        index = codes[start : start + step].int()
        direct = part.view(torch.int64) if dtype is torch.float32 else None
        two = torch.index_select(pairs, 0, index, out=direct).view(torch.float32)
        _scale(two, scales[2 * start // block :], block)
        if direct is None:
            part.copy_(two)
    return whole[:numbers].clone().view(shape) if numbers % 2 else whole.view(shape)


def _scale(numbers: Tensor, scales: Tensor, block: int) -> None:
    """Multiplies each block of `numbers` by its scale; the last block may be shorter."""
    whole = len(numbers) // block
    numbers[: whole * block].view(-1, block).mul_(scales[:whole, None])
    if whole * block < len(numbers):
        numbers[whole * block :].mul_(scales[whole])


def _fake_of_four_bits(
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


def _eight_bits(values: Tensor, scale: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    whole = torch.empty(values.shape, dtype=dtype, device=values.device)
    step = max(1, NUMBERS // values.shape[1])
    for start in range(0, len(values), step):
        part, out = values[start : start + step], whole[start : start + step]
        wide = out.copy_(part) if dtype is torch.float32 else part.float()
        wide.mul_(scale[start : start + step, None]).mul_(INT8_STEP)
        if dtype is not torch.float32:
            out.copy_(wide)
    return whole.view(shape)


def _fake_of_eight_bits(values: Tensor, scale: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return values.new_empty(shape, dtype=dtype)


for name, function in (("peftc::dequantize_4bit", _four_bits), ("peftc::dequantize_int8", _eight_bits)):
    torch.library.impl(name, "CompositeExplicitAutograd", function)
    runs(name, function)
torch.library.register_fake("peftc::dequantize_4bit", _fake_of_four_bits)
torch.library.register_fake("peftc::dequantize_int8", _fake_of_eight_bits)


@torch.library.impl("peftc::dequantize_4bit", "CUDA")
def _four_bits_on_cuda(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    levels: str,
    block: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    from peftc.kernels.gpu import dequantize as gpu

    tables = levels_of(levels, packed.device), dynamic_map(packed.device)
    return gpu.dequantize_4bit(packed, absmax, nested_absmax, offset, *tables, block, shape, dtype)
