"""Packed numbers are bitsandbytes', to the bit, and so is what comes out of them."""

from __future__ import annotations

import warnings
from math import prod
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftc.kernels.dequantize import INT8_STEP, dynamic_map, levels_of
from peftc.protocol.fourbit import BLOCKS, rounded
from peftc.protocol.storage import Storage, storages

torch.set_num_threads(1)

CPU = torch.device("cpu")
# Of a row, of a block, of an odd number, of two codes, and more than one chunk of the decoder.
SHAPES = [(48, 64), (24, 128), (5, 7), (32, 48), (3, 66), (130, 130), (3, 24, 40), (1, 1), (300, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FOUR_BIT = ["nf4", "fp4"]
EVERY = ["nf4", "nf4 double", "fp4", "fp4 double", "nf4 block=256", "int8"]


def made(text: str) -> Storage:
    name, *given = text.split()
    sizes = [int(item.removeprefix("block=")) for item in given if item.startswith("block=")]
    values = {"double": "double" in given, "block": next(iter(sizes), 64)} if name in FOUR_BIT else {}
    return storages()[name](**values)


def normal(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bitsandbytes(part: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: ModuleType = pytest.importorskip(f"bitsandbytes.{part}")
        return found


def definition(storage: Storage, shape: tuple[int, ...], buffers: dict[str, Tensor]) -> Tensor:
    """One number at a time, in fp32."""
    if storage.name == "int8":
        rows = [row.float() * scale * INT8_STEP for row, scale in zip(*buffers.values(), strict=True)]
        return torch.stack(rows).view(shape)
    table, absmax, block = levels_of(storage.name, CPU), buffers["absmax"], storage.values["block"]
    if "offset" in buffers:
        steps = [dynamic_map(CPU)[code] * buffers["nested_absmax"][i // 256] for i, code in enumerate(absmax.tolist())]
        absmax = torch.stack(steps) + buffers["offset"]
    codes = [code for byte in buffers["packed"].flatten().tolist() for code in (byte >> 4, byte & 15)]
    return torch.stack([table[codes[i]] * absmax[i // block] for i in range(prod(shape))]).view(shape)


# ---- The numbers -------------------------------------------------------------------------------------------------


def test_the_tables_are_bitsandbytes() -> None:
    theirs = bitsandbytes("functional")
    for name in FOUR_BIT:
        assert torch.equal(levels_of(name, CPU), theirs.get_4bit_type(name, device="cpu"))
    assert torch.equal(dynamic_map(CPU), theirs.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [64, 256])
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("name", FOUR_BIT)
def test_four_bits_are_bitsandbytes(
    name: str, double: bool, block: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Its packed numbers; and its decoder's, where that is right: it is not below 64 columns (0.50.2)."""
    theirs, weight = bitsandbytes("functional"), normal(shape, dtype=dtype)
    packed, state = theirs.quantize_4bit(weight, quant_type=name, blocksize=block, compress_statistics=double)
    storage = storages()[name](double=double, block=block)
    own = storage.pack(weight)
    assert torch.equal(own["packed"], packed)
    assert torch.equal(own["absmax"], state.absmax)
    if double:
        assert torch.equal(own["offset"], state.offset)
        assert torch.equal(own["nested_absmax"], state.state2.absmax)
    if shape[-1] >= block and len(shape) == 2:
        assert torch.equal(storage.unpack(shape, dtype, **own), theirs.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) == 2], ids=str)
def test_eight_bits_are_bitsandbytes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    theirs, storage = bitsandbytes("functional"), made("int8")
    weight = normal(shape, dtype=dtype)
    weight[0] = 0 if shape[0] > 1 else weight[0]
    values, scale, _ = theirs.int8_vectorwise_quant(weight.half())
    own = storage.pack(weight)
    assert torch.equal(own["values"], values)
    assert torch.equal(own["scale"], scale)
    dense = theirs.int8_vectorwise_dequant(values, scale)
    assert torch.equal(storage.unpack(shape, dtype, **own), dense.to(dtype))


@pytest.mark.parametrize("text", EVERY)
@given(
    shape=st.lists(st.integers(1, 20), min_size=2, max_size=3).map(tuple),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
)
@settings(max_examples=25)
def test_what_is_unpacked_is_the_definition(
    text: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float
) -> None:
    storage = made(text)
    weight = scale * normal(shape, seed, dtype)
    buffers = storage.pack(weight)
    described = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in buffers.items()}
    assert described == {name: (b.shape, b.dtype) for name, b in storage.buffers(shape, dtype).items()}
    dense = storage.unpack(shape, dtype, **buffers)
    assert torch.equal(dense, definition(storage, shape, buffers).to(dtype))
    turned = weight.transpose(-2, -1).contiguous().transpose(-2, -1)  # what a view of another layout is packed to
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in storage.pack(turned).items())


@pytest.mark.parametrize("text", ["nf4", "fp4", "nf4 block=256"])
@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 40)), seed=st.integers(0, 2**31))
@settings(max_examples=30)
def test_what_was_rounded_stays_as_it_is(text: str, shape: tuple[int, int], seed: int) -> None:
    """LoftQ rounds a weight before it is stored, which then loses nothing; but with double, which moves the scales."""
    storage = made(text)
    once = rounded(normal(shape, seed), storage.name, storage.values["block"])
    assert torch.equal(storage.unpack(shape, once.dtype, **storage.pack(once)), once)


@pytest.mark.parametrize("text", EVERY)
def test_zeros_stay_zeros(text: str) -> None:
    storage = made(text)
    assert not storage.unpack((5, 70), torch.float32, **storage.pack(torch.zeros(5, 70))).any()


@pytest.mark.parametrize("name", FOUR_BIT)
def test_a_weight_of_several_chunks(name: str) -> None:
    """2^20 numbers are rounded, and 2^18 decoded, at a time."""
    weight, theirs = normal((1100, 1001)), bitsandbytes("functional")
    packed, state = theirs.quantize_4bit(weight, quant_type=name, blocksize=4096, compress_statistics=True)
    storage = storages()[name](double=True, block=4096)
    own = storage.pack(weight)
    assert torch.equal(own["packed"], packed)
    assert torch.equal(own["absmax"], state.absmax)
    scales = theirs.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()[: weight.numel()].int()
    expected = levels_of(name, CPU)[codes] * scales.repeat_interleave(4096)[: weight.numel()]
    assert torch.equal(storage.unpack((1100, 1001), torch.float32, **own), expected.view(1100, 1001))


def test_which_blocks_there_are() -> None:
    assert made("nf4 block=32").conflict() is None
    assert str(max(BLOCKS)) in str(made("nf4 block=100").conflict())


# ---- The operations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_the_operations_keep_the_rules(double: bool) -> None:
    """Fakes, schema, no hidden aliasing or mutation."""
    weight = normal((24, 80))
    four = storages()["nf4"](double=double).pack(weight)
    nested = four.get("nested_absmax"), four.get("offset")
    arguments = (four["packed"], four["absmax"], *nested, "nf4", 64, (24, 80), torch.bfloat16)
    torch.library.opcheck(torch.ops.peftc.dequantize_4bit.default, arguments)
    eight = made("int8").pack(weight)
    others = (eight["values"], eight["scale"], (24, 80), torch.float32)
    torch.library.opcheck(torch.ops.peftc.dequantize_int8.default, others)


@pytest.mark.parametrize("text", EVERY)
def test_it_is_one_operation_of_the_graph(text: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    storage = made(text)
    buffers = storage.pack(normal((24, 80)))
    graph = make_fx(lambda given: storage.unpack((24, 80), torch.float32, **given))(buffers).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert len(called) == 1
    assert called[0].startswith("peftc.dequantize")


# ---- bitsandbytes' state dict ------------------------------------------------------------------------------------


def layer_of(text: str, weight: Tensor) -> Any:
    """bitsandbytes' own layer, quantised from `weight`; it is never run."""
    nn, name = bitsandbytes("nn"), text.split()[0]
    n_out, n_in = weight.shape
    if name == "int8":
        layer = nn.Linear8bitLt(n_in, n_out, bias=False, has_fp16_weights=False)
        layer.weight = nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        double = "double" in text
        layer = nn.Linear4bit(n_in, n_out, bias=False, quant_type=name, compress_statistics=double)
        layer.weight = nn.Params4bit(
            weight.clone(), requires_grad=False, quant_type=name, compress_statistics=double, blocksize=64
        )
    return layer.to("cpu")


WITHOUT_BLOCK = [text for text in EVERY if "block" not in text]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", WITHOUT_BLOCK)
def test_the_state_dict_is_bitsandbytes(text: str, dtype: torch.dtype) -> None:
    weight, storage = normal((48, 96), dtype=dtype), made(text)
    theirs = layer_of(text, weight).state_dict()
    buffers = storage.pack(weight)
    own = storage.to_bitsandbytes((48, 96), dtype, buffers)
    assert own is not None
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[key], tensor) for key, tensor in theirs.items())
    read = storage.from_bitsandbytes(theirs)
    assert read is not None
    assert read.keys() == buffers.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in buffers.items())


@pytest.mark.parametrize("text", WITHOUT_BLOCK)
def test_a_state_dict_of_another_storage_is_not_read(text: str) -> None:
    weight = normal((48, 96))
    state = made(text).to_bitsandbytes((48, 96), weight.dtype, made(text).pack(weight))
    assert state is not None
    for other in EVERY:
        assert (made(other).from_bitsandbytes(state) is None) == (other != text)
