"""Exports: GGUF files that transformers reads back, adapters that are the change of them, folders as vLLM has them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import models
import peftc
from exported import COMMON, TOKENS, byte_level, learned, sentencepiece_like, tiny
from peftc.files.export.vllm import served_rank

QUICK, OTHERS = ("llama", "phi3", "gpt2"), ("mistral", "qwen2", "qwen3", "gemma2")
KINDS = (*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS))
SPEC = "apply lora(r=4) to attn.*\napply lora(r=2, alpha=3) to mlp.*"


def words(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer for a kind of model; two kinds of it in all."""
    return sentencepiece_like() if kind == "phi3" else byte_level()


def ids() -> torch.Tensor:
    return torch.randint(0, TOKENS, (2, 12), generator=torch.Generator().manual_seed(5))


def read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}


def said(path: Path, key: str) -> Any:
    return gguf.GGUFReader(path).fields[key].contents()


def from_gguf(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@pytest.mark.whole
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_file_is_read_back_as_the_merged_model(kind: str, tmp_path: Path) -> None:
    compiled = learned(peftc.compile(tiny(kind), SPEC))
    (written,) = compiled.export("gguf", tmp_path / "merged.gguf", merged=True, tokenizer=words(kind))
    assert written.tensors == len(read(written.path))
    back, merged = from_gguf(written.path), compiled.merge().eval()
    assert type(back) is (LlamaForCausalLM if kind == "mistral" else type(merged))  # which computes the same
    assert torch.equal(back(ids()).logits, merged(ids()).logits)
    assert os_names(tmp_path) == {"merged.gguf"}


@pytest.mark.whole
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_difference_of_merged_and_base(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    compiled = learned(peftc.compile(model, SPEC))
    compiled.export("gguf", tmp_path / "adapter.gguf")
    compiled.export("gguf", tmp_path / "merged.gguf", merged=True, tokenizer=words(kind))
    same = peftc.compile(model, "apply lora(r=1) to attn.v")  # which starts as the base
    same.export("gguf", tmp_path / "base.gguf", merged=True, tokenizer=words(kind))
    adapter, merged, base = (read(tmp_path / f"{name}.gguf") for name in ("adapter", "merged", "base"))
    assert said(tmp_path / "adapter.gguf", "general.type") == "adapter"
    assert said(tmp_path / "adapter.gguf", "adapter.type") == "lora"
    architecture = said(tmp_path / "base.gguf", "general.architecture")
    assert said(tmp_path / "adapter.gguf", "general.architecture") == architecture
    alpha = said(tmp_path / "adapter.gguf", "adapter.lora.alpha")
    changed = {name.removesuffix(".lora_a") for name in adapter if name.endswith(".lora_a")}
    assert len(adapter) == 2 * len(changed)
    for name, weight in base.items():
        if name not in changed:
            np.testing.assert_array_equal(merged[name], weight)
            continue
        a, b = adapter[f"{name}.lora_a"], adapter[f"{name}.lora_b"]
        assert (a.shape[1], b.shape[0]) == (weight.shape[1], weight.shape[0])
        assert a.shape[0] == b.shape[1]
        delta = alpha / a.shape[0] * b @ a  # llama_adapter_lora_weight::get_scale
        assert np.abs(delta).max() > 1e-3
        np.testing.assert_allclose(merged[name] - weight, delta, rtol=0, atol=1e-6)
    known = {name for name in base if "blk" in name}
    assert {re.sub(r"\d+", "N", name) for name in changed} <= {re.sub(r"\d+", "N", name) for name in known}


def os_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_numbers_are_rounded_where_they_may_be(dtype: str, tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**COMMON | {"intermediate_size": 64})).eval()
    compiled = learned(peftc.compile(model, SPEC))
    (written,) = compiled.export("gguf", tmp_path / "m.gguf", merged=True, dtype=dtype, tokenizer=byte_level())
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(written.path).tensors}
    wanted = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {wanted}
    back, merged = from_gguf(written.path).state_dict(), compiled.merge().state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(back[name], tensor, rtol=0.01, atol=0.01 * float(tensor.abs().max()))
    compiled.export("gguf", tmp_path / "a.gguf", dtype=dtype)
    adapter = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    # of B the rows are as long as the rank, which is no whole number of blocks
    assert set(adapter.values()) == ({wanted, "F32"} if dtype == "q8_0" else {wanted})


def test_a_model_in_half_precision_stays_so(tmp_path: Path) -> None:
    model: Any = tiny("llama")
    compiled = learned(peftc.compile(model.to(torch.bfloat16), SPEC))
    compiled.export("gguf", tmp_path / "m.gguf", merged=True, tokenizer=byte_level())
    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert found["blk.0.attn_q.weight"] == "BF16"
    assert "rope_freqs.weight" not in found  # frequencies are as they were before the cast
    back, merged = from_gguf(tmp_path / "m.gguf").state_dict(), compiled.merge().state_dict()
    assert all(torch.equal(back[name], tensor.float()) for name, tensor in merged.items())


def test_what_does_not_fit_a_dtype_is_refused(tmp_path: Path) -> None:
    compiled = learned(peftc.compile(tiny("llama"), "apply lora(r=2) to attn.v"))
    with torch.no_grad():
        next(iter(compiled.trainable_parameters().values())).fill_(1e6)
    for merged in (True, False):
        with pytest.raises(peftc.PeftcError, match=r"is read back as other numbers \(F16\)"):
            compiled.export("gguf", tmp_path / "m.gguf", merged=merged, dtype="float16", tokenizer=byte_level())
    assert not os_names(tmp_path)


def slowed(**settings: Any) -> LlamaForCausalLM:
    given = {"rope_theta": 10000.0, "factor": 8.0, **settings}
    return LlamaForCausalLM(LlamaConfig(**COMMON, head_dim=16, rope_parameters=given))


def test_slower_rotations_are_said_as_llama_cpp_has_them(tmp_path: Path) -> None:
    """transformers' reader passes them by, so that they are held against its own model."""
    by_place = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = slowed(rope_type="llama3", **by_place)
    compiled = peftc.compile(model, "apply lora(r=2) to attn.v")
    compiled.export("gguf", tmp_path / "m.gguf", merged=True, tokenizer=byte_level())
    factors = read(tmp_path / "m.gguf")["rope_freqs.weight"]
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    frequencies: Any = model.model.rotary_emb.inv_freq
    np.testing.assert_allclose(plain / factors, frequencies.numpy(), rtol=1e-5)
    assert factors.min() == pytest.approx(1)
    assert factors.max() == pytest.approx(8)
    compiled = peftc.compile(slowed(rope_type="linear"), "apply lora(r=2) to attn.v")
    compiled.export("gguf", tmp_path / "linear.gguf", merged=True, tokenizer=byte_level())
    assert said(tmp_path / "linear.gguf", "llama.rope.scaling.type") == "linear"
    assert said(tmp_path / "linear.gguf", "llama.rope.scaling.factor") == pytest.approx(8)
    assert "rope_freqs.weight" not in read(tmp_path / "linear.gguf")


@pytest.mark.parametrize("make", [byte_level, lambda: sentencepiece_like(adds_space=False)])
def test_the_tokenizer_is_read_back(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    tokenizer.chat_template = "{{ messages }}"
    compiled = peftc.compile(tiny("gemma2"), "apply lora(r=2) to attn.v")
    compiled.export("gguf", tmp_path / "m.gguf", merged=True, tokenizer=tokenizer)
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("if x is None:\n    return  12", "déjà vu <s>"):
        assert back(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids
    assert (back.bos_token_id, back.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert back.chat_template == tokenizer.chat_template
    assert len(said(tmp_path / "m.gguf", "tokenizer.ggml.tokens")) == TOKENS  # rows without a token have a name


def test_parts_of_one_weight_are_one_change(tmp_path: Path) -> None:
    """q, k and v of a fused layer have branches of their own, of other ranks and scales."""
    model = tiny("gpt2")
    spec = "apply lora(r=2, alpha=2) to attn.q\napply lora(r=3, alpha=5) to attn.v"
    compiled = learned(peftc.compile(model, spec))
    (written,) = compiled.export("gguf", tmp_path / "a.gguf")
    assert written.rank == 5
    tensors, alpha = read(written.path), said(written.path, "adapter.lora.alpha")
    a, b = (tensors[f"blk.1.attn_qkv.weight.lora_{side}"] for side in "ab")
    merged = dict(compiled.merge().named_parameters())["transformer.h.1.attn.c_attn.weight"]
    delta = (merged - dict(model.named_parameters())["transformer.h.1.attn.c_attn.weight"]).detach().numpy().T
    np.testing.assert_allclose(alpha / 5 * b @ a, delta, rtol=0, atol=1e-6)


def test_a_part_of_the_weight_taken_out_is_put_back(tmp_path: Path) -> None:
    model = tiny("llama")
    compiled = learned(peftc.compile(model, "apply lora(r=3, init=pissa) to mlp.up"))
    (written,) = compiled.export("gguf", tmp_path / "a.gguf")
    tensors, alpha = read(written.path), said(written.path, "adapter.lora.alpha")
    a, b = (tensors[f"blk.0.ffn_up.weight.lora_{side}"] for side in "ab")
    name = "model.layers.0.mlp.up_proj.weight"
    delta = dict(compiled.merge().named_parameters())[name] - dict(model.named_parameters())[name]
    np.testing.assert_allclose(alpha / a.shape[0] * b @ a, delta.detach().numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3"])
def test_hf_peft_reads_what_vllm_is_given(kind: str, tmp_path: Path) -> None:
    """All layers have one rank and one alpha there, whatever they have here."""
    model = tiny(kind)
    compiled = learned(peftc.compile(model, SPEC))
    (written,) = compiled.export("vllm", tmp_path / "adapter")
    config = json.loads((written.path / "adapter_config.json").read_text())
    assert not {"rank_pattern", "alpha_pattern"} & config.keys()
    rank = 12 if kind == "phi3" else 4  # of q, k and v, which are one layer
    assert (config["r"], config["bias"], config["modules_to_save"], config["use_dora"]) == (rank, "none", None, False)
    theirs = peft.PeftModel.from_pretrained(model, str(written.path)).eval()
    torch.testing.assert_close(theirs(ids()).logits, compiled(input_ids=ids()).logits, rtol=0, atol=1e-5)


def test_a_merged_folder_has_all_that_is_served(tmp_path: Path) -> None:
    compiled = learned(peftc.compile(tiny("llama"), SPEC))
    compiled.export("vllm", tmp_path / "merged", merged=True, tokenizer=byte_level())
    names = os_names(tmp_path / "merged")
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(back(ids()).logits, compiled.merge().eval()(ids()).logits)
    AutoTokenizer.from_pretrained(tmp_path / "merged")
    compiled.export("vllm", tmp_path / "half", merged=True, dtype="bfloat16", tokenizer=byte_level())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_each_task_has_a_file_of_its_own(tmp_path: Path) -> None:
    spec = "task a { apply lora(r=2) to attn.q }\ntask b { apply lora(r=4) to mlp.* }\n"
    many = learned(peftc.compile(tiny("llama"), spec))
    written = many.export("gguf", tmp_path / "all")
    assert [one.path.name for one in written] == ["a.gguf", "b.gguf"]
    assert [one.rank for one in written] == [2, 4]
    (alone,) = many.export("gguf", tmp_path / "b.gguf", task="b")
    assert alone.path.read_bytes() == written[1].path.read_bytes()
    many.export("vllm", tmp_path / "folders")
    assert os_names(tmp_path / "folders") == {"a", "b"}
    many.use("b").export("gguf", tmp_path / "merged.gguf", merged=True, tokenizer=byte_level())
    wanted = many.eval()(input_ids=ids()).logits
    torch.testing.assert_close(from_gguf(tmp_path / "merged.gguf")(ids()).logits, wanted, rtol=0, atol=1e-5)


def test_the_rank_that_serves() -> None:
    assert [served_rank(rank) for rank in (1, 5, 16, 300)] == [1, 8, 16, 320]


@pytest.mark.slow
@pytest.mark.whole
def test_smollm2_is_read_back(tmp_path: Path) -> None:
    compiled = learned(peftc.compile(models.smollm2(), "apply lora(r=8) to attn.*, mlp.*"))
    compiled.export("gguf", tmp_path / "merged.gguf", merged=True)
    tokens = torch.randint(0, 49152, (1, 9), generator=torch.Generator().manual_seed(5))
    assert torch.equal(from_gguf(tmp_path / "merged.gguf")(tokens).logits, compiled.merge().eval()(tokens).logits)
