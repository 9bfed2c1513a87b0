"""Four bits a number: which of sixteen levels it is, times the largest magnitude of its block.

    w ≈ level[code] * absmax[block]

NF4 has its levels at the quantiles of a normal distribution, FP4 has a sign, two bits of exponent and one of mantissa.
With double quantisation the absmax are eight-bit numbers, too (Dettmers et al. 2023, arXiv:2305.14314). Levels,
rounding and layout are those of bitsandbytes 0.50.2 on the CPU, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

from peftc.protocol import F, Lazy, Tensor, torch
from peftc.protocol.storage import Buffer, Storage

if TYPE_CHECKING:
    from peftc.kernels import dequantize
else:
    dequantize = Lazy("peftc.kernels.dequantize")

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Numbers that are rounded at a time, a multiple of every block: what that takes is no multiple of a large weight.
CHUNK = 1 << 18
SMALLEST = 1e-38  # bitsandbytes divides by this where a block is all zeros
CELLS = 1024
FACTS = "quant_state.bitsandbytes__"  # and the storage's name
DTYPES = ("float32", "float16", "bfloat16")
GRID = 65535  # steps of [-1, 1] that bitsandbytes rounds to before it looks up the nearest of 256 numbers


class FourBit(Storage):
    """Packed four-bit codes with a scale for each block of `block` numbers, in the order of the weight's rows.

    packed          uint8 [ceil(N / 2), 1]       two codes each, the first in the high bits
    absmax          fp32 [blocks], or with `double` uint8 [blocks]: (absmax - offset) / nested_absmax, one of 256
    nested_absmax   fp32 [ceil(blocks / 256)]
    offset          fp32 []                      the mean of the absmax
    """

    double: bool
    block: int

    def conflict(self) -> str | None:
        return None if self.block in BLOCKS else f"block must be one of {', '.join(map(str, BLOCKS))}"

    def buffers(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Buffer]:
        numbers = prod(shape)
        blocks = -(-numbers // self.block)
        packed = {"packed": Buffer((-(-numbers // 2), 1), torch.uint8)}
        if not self.double:
            return packed | {"absmax": Buffer((blocks,), torch.float32)}
        return packed | {
            "absmax": Buffer((blocks,), torch.uint8),
            "nested_absmax": Buffer((-(-blocks // dequantize.NESTED_BLOCK),), torch.float32),
            "offset": Buffer((), torch.float32),
        }

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        packed, absmax = quantized(weight, self.name, self.block)
        if not self.double:
            return {"packed": packed, "absmax": absmax}
        offset = absmax.mean()
        codes, nested = quantized_to_bytes(absmax - offset)
        return {"packed": packed, "absmax": codes, "nested_absmax": nested, "offset": offset}

    def unpack(self, shape: tuple[int, ...], dtype: torch.dtype, **buffers: Tensor) -> Tensor:
        nested = buffers.get("nested_absmax"), buffers.get("offset")
        dense: Tensor = dequantize.dequantize_4bit(
            buffers["packed"], buffers["absmax"], *nested, self.name, self.block, shape, dtype
        )
        return dense

    def to_bitsandbytes(
        self, shape: tuple[int, ...], dtype: torch.dtype, buffers: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        facts: dict[str, Any] = {
            "quant_type": self.name, "blocksize": self.block, "dtype": _name(dtype), "shape": list(shape)
        }  # fmt: skip
        device = buffers["packed"].device
        state = {
            "weight": buffers["packed"], "weight.absmax": buffers["absmax"],
            "weight.quant_map": dequantize.levels_of(self.name, device).clone(),
        }  # fmt: skip
        if self.double:
            state["weight.nested_absmax"] = buffers["nested_absmax"]
            state["weight.nested_quant_map"] = dequantize.dynamic_map(device).clone()
            facts |= {
                "nested_blocksize": dequantize.NESTED_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": buffers["offset"].item(),
            }
        text = json.dumps(facts).encode()
        return state | {f"weight.{FACTS}{self.name}": torch.tensor(list(text), dtype=torch.uint8, device=device)}

    def bitsandbytes_settings(self, dtype: torch.dtype) -> dict[str, object]:
        return {
            "load_in_4bit": True, "bnb_4bit_quant_type": self.name, "bnb_4bit_use_double_quant": self.double,
            "bnb_4bit_compute_dtype": _name(dtype),
        }  # fmt: skip

    @classmethod
    def of_bitsandbytes(cls, state: Mapping[str, Tensor]) -> tuple[Storage, tuple[int, ...], torch.dtype] | None:
        facts = cls._facts_in(state)
        if facts is None:
            return None
        dtype = getattr(torch, facts["dtype"]) if facts["dtype"] in DTYPES else None
        if dtype is None:
            raise ValueError(f"a packed weight is said to be {facts['dtype']}")
        double = "weight.nested_absmax" in state
        return cls(double=double, block=facts["blocksize"]), tuple(facts["shape"]), dtype

    @classmethod
    def _facts_in(cls, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """What bitsandbytes writes beside a packed weight."""
        text = state.get(f"weight.{FACTS}{cls.name}")
        facts: dict[str, Any] | None = None if text is None else json.loads(bytes(text.tolist()))
        return facts

    def from_bitsandbytes(self, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        facts = self._facts_in(state)
        double = "weight.nested_absmax" in state
        if facts is None or facts["blocksize"] != self.block or double != self.double:
            return None
        device = state["weight"].device
        maps = {
            "weight.quant_map": dequantize.levels_of(self.name, device),
            "weight.nested_quant_map": dequantize.dynamic_map(device),
        }
        if any(name in state and not torch.equal(state[name], own) for name, own in maps.items()):
            return None
        buffers = {"packed": state["weight"].view(torch.uint8).reshape(-1, 1), "absmax": state["weight.absmax"]}
        if not double:
            return buffers
        offset = torch.tensor(facts["nested_offset"], dtype=torch.float32, device=device)
        return buffers | {"nested_absmax": state["weight.nested_absmax"], "offset": offset}


def rounded(weight: Tensor, levels: str, block: int = 64) -> Tensor:
    """`weight` as it comes back from four bits, in its own dtype: blocks in memory order, the last may be shorter."""
    packed, absmax = quantized(weight, levels, block)
    dense: Tensor = dequantize.dequantize_4bit(packed, absmax, None, None, levels, block, weight.shape, weight.dtype)
    return dense


def quantized(weight: Tensor, levels: str, block: int) -> tuple[Tensor, Tensor]:
    """Packed codes, uint8 [ceil(N / 2), 1], and each block's largest magnitude, fp32 [ceil(N / block)]."""
    flat = weight.reshape(-1)
    packed = torch.empty(-(-len(flat) // 2), 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-len(flat) // block), dtype=torch.float32, device=flat.device)
    for start in range(0, len(flat), CHUNK):
        codes, scales = _codes(flat[start : start + CHUNK].float(), levels, block)
        packed[start // 2 : start // 2 + len(codes) // 2, 0] = codes[::2] << 4 | codes[1::2]
        absmax[start // block : start // block + len(scales)] = scales
    return packed, absmax


def _codes(numbers: Tensor, levels: str, block: int) -> tuple[Tensor, Tensor]:
    """An even number of codes, and the scales. A whole block is multiplied by 1/absmax, a shorter one divided."""
    whole = len(numbers) // block * block
    blocks = numbers[:whole].view(-1, block)
    absmax = blocks.abs().amax(1)
    relative = (blocks * (1.0 / absmax.clamp(min=SMALLEST)[:, None])).clamp_(-1, 1).flatten()
    if whole < len(numbers):
        last = numbers[whole:].abs().max().clamp(min=SMALLEST)
        absmax = torch.cat([absmax, last[None]])
        relative = torch.cat([relative, (numbers[whole:] / last).clamp_(-1, 1)])
    if len(relative) % 2:
        relative = F.pad(relative, (0, 1))
    return _nearest(relative, levels), absmax


def _nearest(relative: Tensor, levels: str) -> Tensor:
    """fp32 [n] in [-1, 1] -> uint8 [n], the code of the nearest level, of two equally near ones the lower.

    The range is cut into cells so narrow that at most one border between two levels falls in each: which side of that
    a number is on tells its code. That takes a quarter of the time of a binary search over the borders.
    """
    border, codes = _cells(levels, relative.device)
    cell = torch.add(relative, 1).mul_(CELLS / 2).to(torch.int32).clamp_(0, CELLS)  # of a NaN the first
    above = relative > border.index_select(0, cell)
    return codes.index_select(0, cell.mul_(2).add_(above))


@cache
def _cells(levels: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The border in each cell, fp32 [CELLS + 1] (infinity for none), and the codes below and above it, [2 (CELLS + 1)].

    A border on a cell's own edge is that cell's, so it does not matter into which of both its neighbours are rounded.
    """
    ascending = torch.argsort(dequantize.levels_of(levels, device))
    ordered = dequantize.levels_of(levels, device)[ascending]
    borders = (ordered[:-1] + ordered[1:]) / 2
    cell = ((borders.double() + 1) * (CELLS / 2)).long()
    assert len(cell.unique()) == len(cell)
    border = torch.full((CELLS + 1,), torch.inf, device=device)
    border[cell] = borders
    edges = torch.arange(CELLS + 1, device=device).double() * (2 / CELLS) - 1
    below = torch.bucketize(edges, borders.double())
    either = torch.stack([below, (below + 1).clamp(max=len(borders))], 1)
    return border, ascending[either.flatten()].to(torch.uint8)


def quantized_to_bytes(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [n] -> the nearest of `dynamic_map`, uint8 [n], and the scale of each 256, fp32 [ceil(n / 256)].

    As bitsandbytes does on the CPU, which rounds to a grid of 65536 numbers first.
    """
    blocks = F.pad(numbers, (0, -len(numbers) % dequantize.NESTED_BLOCK)).view(-1, dequantize.NESTED_BLOCK)
    absmax = blocks.abs().amax(1)
    relative = (blocks / absmax[:, None]).nan_to_num_(-1.0).flatten()[: len(numbers)]  # 0/0 is the first number
    place = ((relative + 1) * 0.5 * GRID + 0.5).int()
    return _nearest_on_grid(numbers.device)[place], absmax


@cache
def _nearest_on_grid(device: torch.device) -> Tensor:
    """uint8 [65536]: which of `dynamic_map` is nearest to each of the grid's numbers."""
    known = dequantize.dynamic_map(device)
    grid = torch.arange(GRID + 1, dtype=torch.float32, device=device) / GRID * 2 - 1
    return torch.bucketize(grid, (known[1:] + known[:-1]) / 2).to(torch.uint8)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
