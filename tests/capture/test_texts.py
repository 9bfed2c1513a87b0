"""Texts in a row without padding: what is made of them is what is made of each alone, or it is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

import peftc
from marks import first_is_quick
from peftc.bench.flops import count_flops
from peftc.bench.saved_bytes import saved_bytes
from training import randomise
from zoo import ZOO

SIZES: dict[str, Any] = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "pad_token_id": 0}
SHARED = SIZES | {"num_key_value_heads": 2}
WIDE = SHARED | {"head_dim": 24}
ALTERNATING: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
GPT2: dict[str, Any] = {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0}
GPT2 |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT: dict[str, Any] = {"vocab_size": 99, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "dropout": 0.0}
OPT |= {"num_attention_heads": 4, "word_embed_proj_dim": 64}
DRY: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LORA = "apply lora(r=4) to attn.*"
LENGTHS = [7, 3, 1, 9, 5]
Make = Callable[[], Any]

# A model, and at how many attentions its mask goes: where softmax is spelt out, or a chunk is seen, it stays.
CASES: dict[str, tuple[Make, int]] = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SHARED)), 2),
    "qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SHARED)), 2),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**WIDE)), 2),
    "mistral, a window": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**SHARED, sliding_window=4)), 2),
    "gemma 3, alternating": (lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**WIDE, **ALTERNATING)), 2),
    "gemma 2, capped": (lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**WIDE, sliding_window=4)), 0),
    "gpt-2, positions that are learnt": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), 2),
    "gpt-2, dropout": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2 | {"attn_pdrop": 1e-30})), 0),
    "opt, a mask of no positions": (lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT)), 2),
    "mixtral": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SHARED)), 2),
    "llama 4, chunks": (
        lambda: hf.Llama4ForCausalLM(
            hf.Llama4TextConfig(
                **SHARED | {"num_hidden_layers": 4}, head_dim=16, intermediate_size_mlp=96, num_local_experts=2,
                attention_chunk_size=6,
            )
        ), 1,
    ),
}  # fmt: skip


def texts(lengths: Sequence[int] = LENGTHS) -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randint(3, 99, (length,), generator=random) for length in lengths]


def row(given: Sequence[Tensor], **asked: Any) -> dict[str, Any]:
    collator = DataCollatorWithFlattening(return_tensors="pt", **asked)
    batch: dict[str, Any] = collator([{"input_ids": text.tolist()} for text in given])
    return batch


def compiled(make: Make, spec: str = LORA, **more: Any) -> peftc.CompiledModule:
    torch.manual_seed(0)
    found = peftc.compile(make(), spec, **more)
    randomise(found)
    return found


def gradients(model: peftc.CompiledModule) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.trainable_parameters().items() if p.grad is not None}
    model.zero_grad()
    return found


def separately(model: peftc.CompiledModule, given: Sequence[Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The mean over all tokens that are predicted, text by text, and its gradients."""
    total, count = 0.0, sum(len(text) - 1 for text in given)
    for text in given:
        if len(text) > 1:
            loss = model(input_ids=text[None], labels=text[None]).loss * (len(text) - 1) / count
            loss.backward()
            total += loss.item()
    return total, gradients(model)


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To a few dozen roundings of fp32, relative to all of a parameter's gradient."""
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def fired(model: peftc.CompiledModule) -> int:
    (other,) = model.other_graphs
    return next(one.places for one in other.fired if one.rule == "varlen_attention")


def learns_as_separately(model: peftc.CompiledModule) -> None:
    loss = model(**row(texts())).loss
    loss.backward()
    together = gradients(model)
    expected, apart = separately(model, texts())
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    close(together, apart)


@pytest.mark.parametrize("case", first_is_quick(list(CASES)))
def test_gradients_are_those_of_separate_texts(case: str) -> None:
    make, places = CASES[case]
    model = compiled(make)
    learns_as_separately(model)
    assert fired(model) == places


def test_several_rows_and_no_mask_of_all_by_all() -> None:
    model = compiled(CASES["llama"][0])
    halves = texts([5, 7]), texts([4, 1, 7])
    rows = [row(half) for half in halves]
    batch = {name: torch.cat([one[name] for one in rows]) for name in rows[0]}
    loss = model(**batch).loss
    loss.backward()
    together = gradients(model)
    expected, apart = separately(model, [*halves[0], *halves[1]])
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    close(together, apart)
    graph = list(model.other_graphs[0].history.values())[-1]
    made = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    sizes = [[size.node.expr for size in tensor.shape if isinstance(size, torch.SymInt)] for tensor in made]
    (ids,) = graph.find_nodes(op="placeholder", target="input_ids")
    tokens = ids.meta["val"].shape[1].node.expr
    assert any(tokens in each for each in sizes)
    assert not [each for each in sizes if each.count(tokens) > 1]


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["", "\ncheckpoint block"])
def test_what_a_step_keeps_grows_with_the_tokens(spec: str) -> None:
    model = compiled(CASES["llama"][0], LORA + spec)
    kept, counted = [], []
    for count in (8, 16):
        batch = row(texts([20] * count))
        model(**batch)
        own = (*model.parameters(), *model.buffers(), *batch.values())
        kept.append(saved_bytes(lambda: model(**batch).loss, own))  # noqa: B023
        counted.append(count_flops(lambda: model(**batch).loss.backward()))  # noqa: B023
        model.zero_grad()
    assert kept[1] <= 2 * kept[0]
    assert counted[1] == 2 * counted[0]
    loss = model(**batch).loss
    loss.backward()
    together = gradients(model)
    expected, apart = separately(model, texts([20] * 16))
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    close(together, apart)


@pytest.mark.slow
def test_unfused_and_fused_agree() -> None:
    losses = [compiled(CASES["llama"][0], fuse=fuse)(**row(texts())).loss.item() for fuse in (True, False)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


# What else says where texts end


@pytest.mark.parametrize("asked", [{"return_flash_attn_kwargs": True}, {"return_seq_idx": True}])
@pytest.mark.parametrize("with_positions", [True, False])
def test_bounds_are_as_good_as_positions(asked: dict[str, bool], with_positions: bool) -> None:
    model = compiled(CASES["gpt-2, positions that are learnt"][0])
    said = row(texts(), **asked, return_position_ids=with_positions)
    assert ("position_ids" in said) == with_positions
    assert model(**said).loss.item() == model(**row(texts())).loss.item()


WRONG: dict[str, dict[str, Any]] = {
    "other ends": {"cu_seq_lens_q": torch.tensor([0, 7, 10, 25])},
    "queries and keys": {
        "cu_seq_lens_q": torch.tensor([0, 7, 10, 11, 20, 25]), "cu_seq_lens_k": torch.tensor([0, 7, 10, 12, 20, 25]),
    },
    "more tokens": {"cu_seq_lens_q": torch.tensor([0, 7, 10, 11, 20, 26])},
    "not from the first on": {"cu_seq_lens_q": torch.tensor([7, 10, 11, 20, 25])},
    "backwards": {"cu_seq_lens_q": torch.tensor([0, 10, 7, 11, 20, 25])},
    "numbers": {"seq_idx": torch.tensor([[0] * 7 + [1] * 18])},
    "numbers of other tokens": {"seq_idx": torch.zeros(1, 24, dtype=torch.int32)},
    "too short": {"max_length_q": 8},
    "a mask": {"cu_seq_lens_q": torch.tensor([0, 7, 10, 11, 20, 25]), "attention_mask": torch.ones(1, 25)},
}  # fmt: skip


def test_what_contradicts_itself_is_refused() -> None:
    model = compiled(CASES["llama"][0])
    for wrong in WRONG.values():
        with pytest.raises(peftc.PeftcError, match="texts-disagree"):
            model(**row(texts()) | wrong)
    rows = {"input_ids": torch.ones(2, 6, dtype=torch.long), "cu_seq_lens_q": torch.tensor([0, 4, 8, 12])}
    with pytest.raises(peftc.PeftcError, match=r"texts-disagree.*a text goes on in the next row"):
        model(**rows)


# What does not keep texts apart

MIXING: dict[str, tuple[Make, str]] = {
    "tokens that see those behind": (lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES, **DRY)), LORA),
    "a recurrence": (
        lambda: hf.BambaForCausalLM(
            hf.BambaConfig(
                **SHARED, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1,
                mamba_expand=2,
            )
        ), LORA,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", first_is_quick(list(MIXING)))
def test_what_would_mix_them_is_refused(case: str) -> None:
    make, spec = MIXING[case]
    model = compiled(make, spec)
    batch = row(texts())
    for _ in range(2):
        with pytest.raises(peftc.PeftcError, match="texts-mix"):
            model(**batch)
    one = row(texts([9]))
    torch.testing.assert_close(model(**one).loss, model(**one | {"attention_mask": torch.ones(1, 9)}).loss)
    assert all(module.training for module in model.modules())


@pytest.mark.slow
def test_a_prefix_stands_in_front_of_each_text() -> None:
    model = compiled(CASES["llama"][0], "apply prefix(length=3) to attn")
    learns_as_separately(model)


# Trainers


@pytest.mark.slow
@pytest.mark.parametrize("asked", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}])
def test_a_trainer_trains_on_rows_of_texts_as_on_padded_ones(asked: dict[str, bool], tmp_path: Path) -> None:
    data = [{"input_ids": text.tolist(), "labels": text.tolist()} for text in texts([7, 3, 2, 9, 5, 8, 4, 6])]
    states = []
    for flat in (True, False):
        model = compiled(CASES["llama"][0])
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
            save_strategy="no", use_cpu=True, seed=0,
        )  # fmt: skip
        collator = DataCollatorWithFlattening(return_tensors="pt", **asked) if flat else _padded
        Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator).train()
        states.append({name: p.detach().clone() for name, p in model.trainable_parameters().items()})
    for name, parameter in states[0].items():
        torch.testing.assert_close(parameter, states[1][name], rtol=0, atol=2e-5)


def _padded(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(example["input_ids"]) for example in examples)
    gaps = [longest - len(example["input_ids"]) for example in examples]
    return {
        "input_ids": torch.tensor([e["input_ids"] + [0] * gap for e, gap in zip(examples, gaps, strict=True)]),
        "labels": torch.tensor([e["labels"] + [-100] * gap for e, gap in zip(examples, gaps, strict=True)]),
        "attention_mask": torch.tensor([[1] * (longest - gap) + [0] * gap for gap in gaps]),
    }


@pytest.mark.parametrize("rows", [1, 2])
def test_one_row_of_positions_is_for_all(rows: int) -> None:
    model = ZOO["llama"]().eval()
    ids, positions = torch.randint(3, 90, (2, 9)), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    example = {"input_ids": ids, "position_ids": positions.expand(rows, -1)}
    compiled = peftc.compile(model, "apply lora(r=2) to attn.q", example=example).eval()
    with torch.no_grad():
        found = compiled(input_ids=ids, position_ids=positions).logits
        alone = [model(input_ids=part).logits for part in (ids[:, :4], ids[:, 4:])]
    torch.testing.assert_close(found, torch.cat(alone, 1), rtol=0, atol=1e-6)
