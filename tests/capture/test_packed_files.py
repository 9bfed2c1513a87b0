"""Checkpoints in bitsandbytes' packing: read bit for bit, and written by a merge for transformers to read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from bitsandbytes import functional
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftc
from marks import first_is_quick
from peftc.capture.checkpoints.bitsandbytes import Packed
from peftc.capture.checkpoints.references import load_model, parse_reference
from peftc.files.merge import save_merged
from peftc.files.repack import Rounding, repack
from peftc.graph.ir import get_attribute
from peftc.protocol.storage import storages
from zoo import ZOO

torch.set_num_threads(1)

LORA = "apply lora(r=4) to attn.*"
SETTINGS: dict[str, dict[str, Any]] = {
    "nf4(double=true)": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}  # fmt: skip


def base(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Its layers' widths are multiples of 64: bitsandbytes' CPU kernel unpacks no others rightly."""
    sizes: dict[str, Any] = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "gpt2":
            model: Any = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, n_embd=64, n_layer=2, n_head=4, n_positions=32))
        else:
            llama = hf.LlamaConfig(
                **sizes, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2,
            )  # fmt: skip
            model = hf.LlamaForCausalLM(llama)
    return model.to(dtype).eval()


def packed_by_transformers(name: str, storage: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Writes a model's checkpoint in `folder` / packed; returns the model with its layers."""
    model = base(name, dtype)
    model.save_pretrained(folder / "dense")
    settings = hf.BitsAndBytesConfig(**SETTINGS[storage], bnb_4bit_compute_dtype=dtype)
    packed = type(model).from_pretrained(folder / "dense", quantization_config=settings, device_map="cpu", dtype=dtype)
    packed.save_pretrained(folder / "packed")
    return packed


def unpacked(packed: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weight that each packed layer stands for, by bitsandbytes' own functions; its modules are not run."""
    for name, module in packed.named_modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, Linear4bit):
            yield name, functional.dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(module, Linear8bitLt):
            yield name, functional.int8_vectorwise_dequant(weight.data, weight.SCB)


def as_held(model: nn.Module, name: str) -> Tensor:
    """A layer's weight as [n_out, n_in]."""
    layer = model.get_submodule(name)
    weight: Tensor = get_attribute(layer, "weight")
    return weight.T if isinstance(layer, Conv1D) else weight


CASES = first_is_quick(
    [("llama", "nf4(double=true)"), ("llama", "fp4"), ("llama", "int8"), ("gpt2", "nf4(double=true)"), ("gpt2", "int8")]
)
every_case = pytest.mark.parametrize(("name", "storage"), CASES)
every_storage = pytest.mark.parametrize("storage", first_is_quick(list(SETTINGS)))


@every_case
@pytest.mark.whole
def test_it_is_read_as_what_it_stands_for(name: str, storage: str, tmp_path: Path) -> None:
    packed = packed_by_transformers(name, storage, tmp_path)
    model, _ = load_model(parse_reference(str(tmp_path / "packed")))
    weights = dict(unpacked(packed))
    assert len(weights) == (14 if name == "llama" else 8)
    for layer, weight in weights.items():
        torch.testing.assert_close(as_held(model, layer), weight, rtol=0, atol=0)
    for key, parameter in model.named_parameters():
        if key.removesuffix(".weight") not in weights:
            assert torch.equal(parameter, packed.get_parameter(key))
    compiled = peftc.compile(tmp_path / "packed", LORA).eval()
    ids = torch.randint(3, 97, (2, 9))
    with torch.no_grad():  # float32, in another order
        torch.testing.assert_close(compiled(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-5)


@every_case
@pytest.mark.whole
def test_the_same_storage_takes_it_as_it_is(name: str, storage: str, tmp_path: Path) -> None:
    packed_by_transformers(name, storage, tmp_path)
    compiled = peftc.compile(tmp_path / "packed", f"quantize linear except head with {storage}\n{LORA}")
    on_disk = load_file(tmp_path / "packed" / "model.safetensors")
    assert compiled.plan.packed
    for weight, item in compiled.plan.packed.items():
        buffers = {full: get_attribute(compiled, full) for full in item.buffers}
        state = item.to_bitsandbytes(buffers)
        assert state is not None
        for key, tensor in state.items():
            assert torch.equal(tensor, on_disk[f"{weight.removesuffix('.weight')}.{key}"])


@pytest.mark.slow
def test_another_storage_rounds_what_it_stands_for(tmp_path: Path) -> None:
    packed_by_transformers("llama", "int8", tmp_path)
    model, _ = load_model(parse_reference(str(tmp_path / "packed")))
    compiled = peftc.compile(tmp_path / "packed", f"quantize linear except head with nf4\n{LORA}")
    for weight, item in compiled.plan.packed.items():
        expected = item.pack(get_attribute(model, weight).detach())
        assert all(torch.equal(get_attribute(compiled, full), tensor) for full, tensor in expected.items())


@pytest.mark.slow
def test_a_method_that_writes_the_weight_starts_from_what_it_stands_for(tmp_path: Path) -> None:
    """PiSSA takes its part out of the weight, and the rest is rounded: what lies in the file would be too much."""
    packed_by_transformers("llama", "fp4", tmp_path)
    model, _ = load_model(parse_reference(str(tmp_path / "packed")))
    spec = "quantize linear except head with fp4\napply lora(r=4, init=pissa) to attn.q"
    from_file, from_model = peftc.compile(tmp_path / "packed", spec), peftc.compile(model, spec)
    for name, item in from_model.plan.packed.items():
        if name.endswith("q_proj.weight"):
            assert all(torch.equal(get_attribute(from_file, f), get_attribute(from_model, f)) for f in item.buffers)


@pytest.mark.slow
def test_half_precision(tmp_path: Path) -> None:
    packed = packed_by_transformers("llama", "nf4(double=true)", tmp_path, torch.bfloat16)
    model, _ = load_model(parse_reference(str(tmp_path / "packed")))
    assert model.get_parameter("model.norm.weight").dtype is torch.bfloat16
    weights = dict(unpacked(packed))
    assert len(weights) == 14
    for layer, weight in weights.items():
        assert weight.dtype is torch.bfloat16
        assert torch.equal(as_held(model, layer), weight)


def trained(name: str, storage: str) -> peftc.CompiledModule:
    """A quantised model whose adapter is not zero."""
    compiled = peftc.compile(base(name), f"quantize linear except head with {storage}\n{LORA}")
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in compiled.trainable_parameters().values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random))
    return compiled


@every_case
@pytest.mark.whole
def test_a_merged_model_is_written_for_transformers(name: str, storage: str, tmp_path: Path) -> None:
    found = repack(trained(name, storage))
    assert save_merged(found.model, tmp_path / "packed", found.packing)
    assert not save_merged(found.model, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("packed", "dense")]
    assert sizes[0] < 0.5 * sizes[1]

    packed = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map="cpu")
    weights = dict(unpacked(packed))
    assert {f"{layer}.weight" for layer in weights} == found.lost.keys()
    for layer, weight in weights.items():
        assert torch.equal(as_held(found.model, layer), weight)
    again, _ = load_model(parse_reference(str(tmp_path / "packed")))
    assert all(torch.equal(tensor, found.model.state_dict()[key]) for key, tensor in again.state_dict().items())


@pytest.mark.parametrize(
    "spec",
    first_is_quick([
        "quantize attn.* with nf4\nquantize mlp.* with int8",
        "quantize attn.* with nf4\nquantize mlp.* with nf4(double=true)",
    ]),
)  # fmt: skip
def test_what_no_configuration_says_is_written_dense(spec: str) -> None:
    found = repack(peftc.compile(base("llama"), spec + "\napply lora to attn.q"))
    assert found.packing is None
    assert len(found.lost) == 14


def zeroed(name: str, spec: str) -> peftc.CompiledModule:
    """A quantised zoo model."""
    return peftc.compile(ZOO[name](), f"quantize linear except head with {spec}\napply lora(r=4) to attn.q")


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_what_transformers_keeps_in_full_precision_is_not_packed(storage: str) -> None:
    """T5's second feed-forward layer, whatever a configuration says."""
    assert repack(zeroed("t5", storage)).packing is None


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_layers_that_are_one_in_the_file_are_written_dense(storage: str, tmp_path: Path) -> None:
    config = hf.Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8, use_swiglu_ffn=True,
    )  # fmt: skip
    model = hf.Dinov2ForImageClassification(config).eval()
    compiled = peftc.compile(model, f"quantize linear except head with {storage}\napply lora(r=4) to attn.q")
    found = repack(compiled)
    assert found.packing is not None
    assert not save_merged(found.model, tmp_path / "merged", found.packing)
    again = hf.Dinov2ForImageClassification.from_pretrained(tmp_path / "merged")
    assert all(torch.equal(tensor, found.model.state_dict()[key]) for key, tensor in again.state_dict().items())


@every_storage
def test_what_no_method_changes_keeps_its_bits(storage: str) -> None:
    compiled = peftc.compile(base("llama"), f"quantize linear except head with {storage}\n{LORA}")
    found = repack(compiled)
    assert found.packing is not None
    for weight, item in compiled.plan.packed.items():
        if "mlp" in weight:
            assert found.lost[weight] == Rounding(0.0, 0.0)
            buffers = item.to_bitsandbytes({full: get_attribute(compiled, full) for full in item.buffers})
            assert buffers is not None
            written = found.packing.layers[weight.removesuffix(".weight")]
            assert all(torch.equal(tensor, written[key]) for key, tensor in buffers.items())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["relora", "dora", "said(dim=8)"])
def test_a_method_that_starts_as_the_base_starts_as_the_file(method: str, tmp_path: Path) -> None:
    packed_by_transformers("llama", "nf4(double=true)", tmp_path)
    model, _ = load_model(parse_reference(str(tmp_path / "packed")))
    spec = f"quantize linear except head with nf4(double=true)\napply {method} to attn.*"
    compiled = peftc.compile(tmp_path / "packed", spec).eval()
    ids = torch.randint(3, 97, (2, 9))
    with torch.no_grad():  # float32, in another order
        torch.testing.assert_close(compiled(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("lost", [("SCB",), ("SCB", "weight_format")])
def test_codes_without_their_scales_are_no_weights(lost: tuple[str, ...], tmp_path: Path) -> None:
    packed_by_transformers("llama", "int8", tmp_path)
    file = tmp_path / "packed" / "model.safetensors"
    state = load_file(file)
    for name in lost:
        del state[f"model.layers.1.mlp.up_proj.{name}"]
    save_file(state, file, {"format": "pt"})
    for spec in (LORA, f"quantize linear except head with int8\n{LORA}"):
        with pytest.raises(peftc.PeftcError, match="packed"):
            peftc.compile(file.parent, spec)


@pytest.mark.slow
def test_an_older_configuration_does_without_the_name(tmp_path: Path) -> None:
    packed_by_transformers("llama", "fp4", tmp_path)
    file = tmp_path / "packed" / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]["quant_method"]
    file.write_text(json.dumps(config))
    assert peftc.compile(file.parent, LORA).plan.trainable


@pytest.mark.slow
def test_layers_of_bitsandbytes_are_refused(tmp_path: Path) -> None:
    packed = packed_by_transformers("llama", "fp4", tmp_path)
    with pytest.raises(peftc.PeftcError) as caught:
        peftc.compile(packed, LORA)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "packed-layers"
    assert "model.layers.0.self_attn.q_proj and 13 more are bitsandbytes' Linear4bit" in str(caught.value)


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b'"float32"', b'"complex"', "said to be complex"),
        (b'"quant_type"', b'"quant_type', "Expecting"),
        (b'"blocksize"', b'"blacksize"', "blocksize"),
        (b"[128, 64]", b"[64, 128]", r"up_proj.*128, 64"),
    ],
)
def test_a_damaged_file(old: bytes, new: bytes, reason: str, tmp_path: Path) -> None:
    packed_by_transformers("llama", "fp4", tmp_path)
    file = tmp_path / "packed" / "model.safetensors"
    state = load_file(file)
    key = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__fp4"
    text = bytes(state[key].tolist()).replace(old, new)
    save_file(state | {key: torch.tensor(list(text), dtype=torch.uint8)}, file, {"format": "pt"})
    for spec in (LORA, f"quantize linear except head with fp4\n{LORA}"):
        with pytest.raises(peftc.PeftcError, match=reason):
            peftc.compile(file.parent, spec)


SHAPE = (48, 64)
FACTS = "weight.quant_state.bitsandbytes__nf4"


def a_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A layer's state dict, and what it says of itself."""
    storage: Any = storages()["nf4"](double=True)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    state = storage.to_bitsandbytes(SHAPE, weight.dtype, storage.pack(weight))
    return state, json.loads(bytes(state[FACTS].tolist()))


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        (fact, value)
        for fact, values in {
            "blocksize": (0, -64, 63, 128, 6.4, 1 << 40, "64", None),
            "shape": ([-1], [], [48], [48, 65], [48, 64, 1], [1 << 40, 1 << 40], [[3]], "x", None),
            "nested_offset": (None, "a", []),
            "dtype": ("complex64", 3, [], None),
        }.items()
        for value in values
    ],
)
def test_facts_that_cannot_be_are_refused(fact: str, value: Any) -> None:
    state, facts = a_state()
    assert Packed(state)[...].shape == SHAPE
    said = json.dumps(facts | {fact: value}).encode()
    with pytest.raises(ValueError, match="what bitsandbytes packed cannot be read"):
        Packed(state | {FACTS: torch.tensor(list(said), dtype=torch.uint8)})[...]


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("weight", torch.zeros(5, 1, dtype=torch.uint8)),
        ("weight.absmax", torch.zeros(1, dtype=torch.uint8)),
        ("weight.absmax", torch.zeros(48)),
        ("weight.nested_absmax", torch.zeros(1, dtype=torch.int32)),
        ("weight.quant_map", torch.zeros(16)),
        (FACTS, torch.zeros(3)),
        (FACTS, torch.tensor(list(b"[1]"), dtype=torch.uint8)),
    ],
)
def test_tensors_that_cannot_be_are_refused(key: str, tensor: Tensor) -> None:
    state, _ = a_state()
    with pytest.raises(ValueError, match="what bitsandbytes packed cannot be read"):
        Packed(state | {key: tensor})[...]


@pytest.mark.slow
def test_what_another_library_packed_needs_that_library(tmp_path: Path) -> None:
    model = base("llama")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model.save_pretrained(tmp_path)
    with pytest.raises(peftc.PeftcError, match=r"(?i)gptq") as caught:
        peftc.compile(tmp_path, LORA)
    assert caught.value.diagnostics[0].code == "bad-reference"
