"""Models of transformers that cannot be traced whole: they train, and are what they are in eager mode."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

import peftc

SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "intermediate_size": 48}


def recurrent_gemma() -> PreTrainedModel:
    sizes: dict[str, Any] = {**SIZES, **HEADS, "num_hidden_layers": 3, "intermediate_size": 96}
    return hf.RecurrentGemmaForCausalLM(hf.RecurrentGemmaConfig(**sizes, num_key_value_heads=2, lru_width=32))


def dbrx() -> PreTrainedModel:
    attention: dict[str, Any] = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}
    experts: dict[str, Any] = {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
    sizes: dict[str, Any] = {"vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
    return hf.DbrxForCausalLM(hf.DbrxConfig(**sizes, attn_config=attention, ffn_config=experts))


def longformer() -> PreTrainedModel:
    return hf.LongformerForSequenceClassification(
        hf.LongformerConfig(
            **SIZES, **HEADS, attention_window=[4, 4], max_position_embeddings=66, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def led() -> PreTrainedModel:
    halves: dict[str, Any] = {f"{half}_{what}": size for half in ("encoder", "decoder")
              for what, size in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    return hf.LEDForConditionalGeneration(
        hf.LEDConfig(
            vocab_size=97, d_model=32, attention_window=4, dropout=0.0, max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64, **halves,
        )
    )  # fmt: skip


def blt() -> PreTrainedModel:
    part: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "vocab_size": 97,
    }  # fmt: skip
    wide: dict[str, Any] = {**part, "head_dim": 8, "hidden_size_global": 64}
    config = hf.BltConfig(
        vocab_size=97, max_position_embeddings=64, patch_in_forward=True, encoder_hash_byte_group_vocab=50,
        encoder_hash_byte_group_size=[3, 4], patcher_config={**part, "head_dim": 8}, encoder_config=wide,
        decoder_config=wide, global_config={**part, "hidden_size": 64, "head_dim": 16},
    )  # fmt: skip
    config.use_cache = False
    return hf.BltForCausalLM(config)


def rwkv() -> PreTrainedModel:
    return hf.RwkvForCausalLM(hf.RwkvConfig(**SIZES, attention_hidden_size=32, intermediate_size=48, context_length=64))


def jetmoe() -> PreTrainedModel:
    experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return hf.JetMoeForCausalLM(
        hf.JetMoeConfig(**SIZES, num_key_value_heads=2, kv_channels=8, intermediate_size=48, **experts)
    )


def mamba() -> PreTrainedModel:
    return hf.MambaForCausalLM(hf.MambaConfig(**SIZES, state_size=4))


def granite() -> PreTrainedModel:
    experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    return hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**SIZES, **HEADS, **experts))


# Of each how many islands there are, and a word of the first one's path.
MODELS: dict[Callable[[], PreTrainedModel], tuple[int, str]] = {
    mamba: (2, "mixer"), rwkv: (2, "attention"), recurrent_gemma: (2, "temporal_block"), dbrx: (2, "experts"),
    longformer: (2, "self"), led: (1, "longformer_self_attn"), blt: (0, ""),
    jetmoe: (0, ""), granite: (0, ""),
}  # fmt: skip

# What no LoRA of a dense weight can be held against.
EXCEPT = {jetmoe: "(head, expert)", granite: "(head, expert)"}


def batch(model: PreTrainedModel, rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (rows, length))
    given = {"input_ids": ids}
    if "attention_mask" in inspect.signature(type(model).forward).parameters:
        given["attention_mask"] = torch.ones_like(ids)
    return given | {"labels": ids if model.can_generate() else torch.arange(rows) % 2}


def fresh(model: nn.Module) -> nn.Module:
    """A copy, without what modules remember of a forward, which cannot be copied."""
    known: dict[int, Any] = {
        id(held): None
        for part in model.modules()
        for held in vars(part).values()
        if isinstance(held, Tensor) and held.grad_fn
    }
    return copy.deepcopy(model, known)


@pytest.mark.parametrize(
    "make", [pytest.param(make, marks=pytest.mark.slow if place else (), id=make.__name__)
             for place, make in enumerate(MODELS)],
)  # fmt: skip
def test_a_model_with_islands_trains_as_in_eager_mode(make: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = make()
    compiled = peftc.compile(model, f"apply lora(r=2, alpha=4) to linear except {EXCEPT.get(make, 'head')}")
    islands = compiled.plan.captured.islands
    assert len(islands) == MODELS[make][0]
    assert all(MODELS[make][1] in island.path for island in islands)
    first = batch(model, 2, 8)
    expected = model.train()(**first).loss
    torch.testing.assert_close(compiled(**first).loss, expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        for parameter in compiled.trainable_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    reference = fresh(model)
    with torch.no_grad():
        for binding in compiled.plan.bindings:
            site: Any = binding.site
            a, b = (compiled.get_parameter(binding.names[name]) for name in "AB")
            change = 2 * b @ a
            weight = reference.get_parameter(site.owner)
            weight.add_(change.T if site.transposed else change)
    for rows, length in ((2, 8), (3, 11)):
        given = batch(model, rows, length)
        reference.zero_grad()
        compiled.zero_grad()
        expected, found = reference(**given).loss, compiled(**given).loss
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        expected.backward()
        found.backward()
        for binding in compiled.plan.bindings:
            site = binding.site
            whole = reference.get_parameter(site.owner).grad
            if whole is not None and not site.tied:
                whole = whole.T if site.transposed else whole
                a, b = (compiled.get_parameter(binding.names[name]) for name in "AB")
                torch.testing.assert_close(a.grad, 2 * b.T @ whole, rtol=1e-3, atol=1e-5)
                torch.testing.assert_close(b.grad, 2 * whole @ a.T, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_mamba_is_planned_from_its_config_saved_and_merged(tmp_path: Path) -> None:
    spec = 'apply lora(r=2) to "**.in_proj", "**.x_proj"\ntrain "**.A_log", conv'
    torch.manual_seed(0)
    model = mamba()
    model.config.save_pretrained(tmp_path)
    plan = peftc.plan(str(tmp_path / "config.json"), spec)
    assert plan.to_json()["islands"][0]["module"] == "backbone.layers.0.mixer"
    compiled = peftc.compile(model, spec)
    assert compiled.plan.trainable == plan.trainable
    with torch.no_grad():
        for parameter in compiled.trainable_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    given = batch(model, 2, 8)
    expected = compiled.eval()(**given).logits
    compiled.save(tmp_path / "saved")
    model.save_pretrained(tmp_path / "base")
    for base in (model, str(tmp_path / "base")):
        assert torch.equal(peftc.load(tmp_path / "saved", base).eval()(**given).logits, expected)
    merged: Any = compiled.merge().eval()
    torch.testing.assert_close(merged(**given).logits, expected, rtol=1e-4, atol=1e-5)
    prompt, options = given["input_ids"][:1], {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(compiled.generate(prompt, **options), merged.generate(prompt, **options))
