"""Packed numbers are bitsandbytes', to the bit, and so is what comes out of them."""

from __future__ import annotations

import warnings
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from peftc.kernels.dequantize import dynamic_map, levels_of
from peftc.storage import Storage, storages

torch.set_num_threads(1)

CPU = torch.device("cpu")
SHAPES = [(48, 64), (24, 128), (5, 7), (32, 48), (3, 66), (130, 130), (3, 24, 40), (1, 1)]
FOUR_BIT = ["nf4", "fp4"]
EVERY = ["nf4", "nf4 double", "fp4", "fp4 double", "nf4 block=256", "int8"]


def made(text: str) -> Storage:
    name, *given = text.split()
    values: dict[str, Any] = {"double": "double" in given}
    values |= {"block": int(item.removeprefix("block=")) for item in given if item.startswith("block=")}
    return storages()[name](**(values if name in FOUR_BIT else {}))


def normal(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def functional() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes.functional")


def definition_of_4bit(buffers: dict[str, Tensor], levels: str, block: int, count: int) -> Tensor:
    """One number at a time, fp32 [count]."""
    table, absmax = levels_of(levels, CPU), buffers["absmax"]
    if "offset" in buffers:
        steps = [dynamic_map(CPU)[code] * buffers["nested_absmax"][i // 256] for i, code in enumerate(absmax.tolist())]
        absmax = torch.stack(steps) + buffers["offset"]
    codes = [code for byte in buffers["packed"].flatten().tolist() for code in (byte >> 4, byte & 15)]
    return torch.stack([table[codes[i]] * absmax[i // block] for i in range(count)])


def test_the_tables_are_bitsandbytes() -> None:
    theirs = functional()
    for name in FOUR_BIT:
        assert torch.equal(levels_of(name, CPU), theirs.get_4bit_type(name, device="cpu"))
    assert torch.equal(dynamic_map(CPU), theirs.create_dynamic_map())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("name", FOUR_BIT)
def test_four_bits_are_bitsandbytes(name: str, double: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Its packed numbers; decoded as its definition says: its own decoder is wrong below 64 columns (0.50.2)."""
    weight = normal(shape, dtype=dtype)
    packed, state = functional().quantize_4bit(weight, quant_type=name, blocksize=64, compress_statistics=double)
    storage = made(f"{name} double" if double else name)
    own = storage.pack(weight)
    assert torch.equal(own["packed"], packed)
    assert torch.equal(own["absmax"], state.absmax)
    if double:
        assert torch.equal(own["offset"], state.offset)
        assert torch.equal(own["nested_absmax"], state.state2.absmax)
    if prod(shape) < 4000:
        expected = definition_of_4bit(own, name, 64, prod(shape)).view(shape).to(dtype)
        assert torch.equal(storage.unpack(shape, dtype, **own), expected)
    if shape[-1] >= 64 and len(shape) == 2:
        assert torch.equal(storage.unpack(shape, dtype, **own), functional().dequantize_4bit(packed, state))
