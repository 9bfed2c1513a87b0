"""What no other runtime can hold is refused before anything is there, all of it at once, with what to do instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
)

import peftc
from exported import COMMON, byte_level, tiny
from tiny import Stack, example

BESIDE = "export it merged: merged=True, on the command line --merged"


def refused(compiled: peftc.CompiledModule, path: Path, to: Any, **options: Any) -> str:
    """What an export says; nothing is there after it."""
    there = path.exists()
    with pytest.raises(peftc.PeftcError) as caught:
        compiled.export(to, path, **options)
    assert path.exists() == there
    assert not [left for left in path.parent.iterdir() if left.name.startswith(".peftc-")]
    return str(caught.value)


@pytest.mark.parametrize("to", ["gguf", "vllm"])
def test_what_is_no_low_rank_branch(to: str, tmp_path: Path) -> None:
    spec = "apply dora(r=2) to attn.q\napply ia3 to mlp.down\napply lora(r=2) to attn.v\ntrain norm"
    told = refused(peftc.compile(tiny("llama"), spec), tmp_path / "a", to)
    assert told.count(f"not-in-{to}") == 3
    assert "dora is more than a low-rank change of linear layers" in told
    assert "ia3 is more than a low-rank change of linear layers" in told
    assert "an adapter has no place for weights of the base model that learn" in told
    assert "4 | train norm" in told
    assert told.count(BESIDE) == 1  # what all three have in common is told once


def test_a_branch_beside_a_rounded_weight(tmp_path: Path) -> None:
    compiled = peftc.compile(tiny("llama"), "apply lora(r=2, init=loftq) to attn.q")
    assert "init=loftq has rounded this one" in refused(compiled, tmp_path / "a", "gguf")


def test_a_head_that_is_the_embedding(tmp_path: Path) -> None:
    compiled = peftc.compile(tiny("qwen2"), "apply lora(r=2) to head")
    for to in ("gguf", "vllm"):
        assert "lm_head shares its weight with another layer" in refused(compiled, tmp_path / "a", to)


def test_a_model_that_reads_no_text(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [12, 16], "depths": [1, 1]}
    base = ResNetForImageClassification(ResNetConfig(**sizes))
    compiled = peftc.compile(base, "apply lora(r=2) to conv")
    assert "as a resnet" in refused(compiled, tmp_path / "a", "gguf")
    assert "lora is more than a low-rank change of linear layers" in refused(compiled, tmp_path / "a", "vllm")


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    compiled = peftc.compile(tiny("llama"), "apply prefix(length=2) to attn")
    for to in ("gguf", "vllm"):
        assert "prefix cannot be merged" in refused(compiled, tmp_path / "a", to, merged=True, tokenizer=byte_level())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"attention_bias": True}, "its attention_bias=True has no place there, and is read back as False"),
        ({"hidden_act": "gelu"}, "its hidden_act=gelu has no place there, and is read back as silu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "its rope_parameters="),
    ],
)
def test_settings_that_a_file_does_not_say(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    compiled = peftc.compile(LlamaForCausalLM(LlamaConfig(**COMMON, **settings)), "apply lora(r=2) to attn.q")
    told = refused(compiled, tmp_path / "a", "gguf", merged=True, tokenizer=byte_level())
    assert reason in told
    compiled.export("gguf", tmp_path / "adapter.gguf")  # which says none of them


def test_a_window_that_the_architecture_does_not_have(tmp_path: Path) -> None:
    model = MistralForCausalLM(MistralConfig(**COMMON, sliding_window=16))
    compiled = peftc.compile(model, "apply lora(r=2) to attn.q")
    told = refused(compiled, tmp_path / "a", "gguf", merged=True, tokenizer=byte_level())
    assert "its sliding_window=16 has no place there, and is read back as None" in told
    compiled.export("gguf", tmp_path / "adapter.gguf")


def test_a_kind_that_gguf_knows_and_transformers_does_not_read(tmp_path: Path) -> None:
    """Granite is computed as Llama is where its multipliers are 1, and has another architecture all the same."""
    model = GraniteForCausalLM(GraniteConfig(**COMMON))
    compiled = peftc.compile(model, "apply lora(r=2) to attn.q")
    for merged in (True, False):
        told = refused(compiled, tmp_path / "a", "gguf", merged=merged, tokenizer=byte_level())
        assert "of gguf's architectures transformers reads none back as a granite" in told


def test_another_scale_of_attention(tmp_path: Path) -> None:
    model = Gemma2ForCausalLM(Gemma2Config(**COMMON, head_dim=16))  # query_pre_attn_scalar is 256
    compiled = peftc.compile(model, "apply lora(r=2) to attn.q")
    told = refused(compiled, tmp_path / "a", "gguf", merged=True, tokenizer=byte_level())
    assert "self_attn multiplies by 0.0625, and a file's attention by 0.25" in told


def test_a_fused_weight_in_another_order(tmp_path: Path) -> None:
    """Falcon of several key heads: each group has its queries, its key and its value in turn."""
    settings: dict[str, Any] = {"num_kv_heads": 2, "new_decoder_architecture": True, "bias": False, "alibi": False}
    model = FalconForCausalLM(
        FalconConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **settings)
    )
    reason = (
        "transformer.h.0.self_attention.query_key_value.weight would not have all of q, all of k and all of v in turn"
    )
    compiled = peftc.compile(model, "apply lora(r=2) to mlp.up")
    assert reason in refused(compiled, tmp_path / "a", "gguf", merged=True, tokenizer=byte_level())
    compiled.export("gguf", tmp_path / "adapter.gguf")
    compiled = peftc.compile(model, "apply lora(r=2) to attn.q")
    assert reason in refused(compiled, tmp_path / "a", "gguf")


@pytest.mark.parametrize("merged", [True, False])
def test_what_is_no_model_of_a_known_kind(merged: bool, tmp_path: Path) -> None:
    model = Stack()
    compiled = peftc.compile(model, 'apply lora(r=2) to "**.up"', example=example(model))
    told = refused(compiled, tmp_path / "a", "gguf", merged=merged, tokenizer=byte_level())
    assert "a Stack is no model of transformers" in told


def test_tokenizers(tmp_path: Path) -> None:
    compiled = peftc.compile(tiny("llama"), "apply lora(r=2) to attn.q")

    def told(tokenizer: Any) -> str:
        return refused(compiled, tmp_path / "a", "gguf", merged=True, tokenizer=tokenizer)

    assert "no-tokenizer" in told(None)
    assert "no-tokenizer" in told(str(tmp_path / "nowhere"))
    by_word = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    assert "the tokenizer is a WordLevel, and not of byte pairs" in told(by_word)
    other = byte_level()
    other.backend_tokenizer.pre_tokenizer = Split("x", "isolated")
    assert "no name, that is known here, for how the tokenizer splits text" in told(other)
    large = byte_level()
    large.add_tokens([f"<{number}>" for number in range(20)])
    assert "and the model 400 rows of embeddings" in told(large)


@pytest.mark.parametrize(
    ("kind", "spec", "reason"),
    [
        ("gpt2", "apply lora(r=2) to mlp.up", "transformer.h.0.mlp.c_fc is a Conv1D"),
        ("llama", "apply lora(r=600) to attn.q", "has rank 600, and it serves 512 at most"),
    ],
)
def test_what_vllm_does_not_adapt(kind: str, spec: str, reason: str, tmp_path: Path) -> None:
    told = refused(peftc.compile(tiny(kind), spec), tmp_path / "a", "vllm")
    assert reason in told
    assert BESIDE in told


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    compiled = peftc.compile(tiny("llama"), "apply lora(r=2) to attn.q")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    for merged in (True, False):
        given = {"merged": merged, "tokenizer": byte_level()}
        assert "bad-output" in refused(compiled, tmp_path / "file", "gguf", **given)
        assert "bad-output" in refused(compiled, tmp_path / "folder", "gguf", **given)
        assert "bad-output" in refused(compiled, tmp_path / "folder", "vllm", **given)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "file").read_text() == "mine"


def test_what_there_is_not(tmp_path: Path) -> None:
    compiled = peftc.compile(tiny("llama"), "apply lora(r=2) to attn.q")
    assert "there is no runtime 'onnx' to export to: gguf, vllm" in refused(compiled, tmp_path / "a", "onnx")
    assert "unknown-export" in refused(compiled, tmp_path / "a", "vllm", dtype="q8_0")
    assert "unknown-export" in refused(compiled, tmp_path / "a", "gguf", dtype="int4", merged=True)
    parameter = compiled.get_parameter("model.norm.weight")
    parameter.requires_grad_(True)
    assert "not-in-spec" in refused(compiled, tmp_path / "a", "gguf")
