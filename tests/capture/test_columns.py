"""A data set's column that the base model's forward takes is used as the base model uses it, or refused: never dropped.

A Trainer keeps those columns that `inspect.signature(model.forward)` names.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import peftc
from marks import first_is_quick
from training import randomise, trainer

SIZES: dict[str, Any] = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "pad_token_id": 0}
DRY: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LORA = "apply lora(r=4) to attn.q, attn.v"


def llama(kind: Any = hf.LlamaForCausalLM, **more: Any) -> Any:
    return kind(hf.LlamaConfig(**SIZES, **more))


def bert(kind: Any, **more: Any) -> Any:
    return kind(hf.BertConfig(**SIZES, **DRY, **more))


def gpt2() -> Any:
    dry = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, **dry))  # type: ignore[arg-type]


def t5() -> Any:
    sizes: dict[str, Any] = {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    sizes |= {"decoder_start_token_id": 0, "dropout_rate": 0.0}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes))


# Three texts in a row, and the tokens of which a mask keeps the first.
POSITIONS = [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]
MASK = [1] * 8 + [0] * 4
HALVES = [0] * 6 + [1] * 6
random = torch.Generator()
Columns = dict[str, Any]


def tokens(count: int = 12, below: int = 99, start: int = 0) -> Any:
    return torch.randint(start, below, (count,), generator=random).tolist()


def one(below: int) -> Any:
    return int(torch.randint(below, (), generator=random))


Case = tuple[Callable[[], Any], Columns]
TEXT: Columns = {"input_ids": partial(tokens, start=3), "labels": partial(tokens, start=3)}
CLASSES: Columns = {"input_ids": partial(tokens, start=3), "labels": partial(one, 3)}
SPAN: Columns = {
    "input_ids": partial(tokens, start=3), "start_positions": partial(one, 8), "end_positions": partial(one, 8)
}  # fmt: skip
CASES: dict[str, Case] = {
    "texts told apart by positions": (llama, TEXT | {"position_ids": POSITIONS}),
    "positions beside a mask": (llama, TEXT | {"position_ids": POSITIONS, "attention_mask": MASK}),
    "embeddings": (
        llama,
        {"inputs_embeds": lambda: torch.randn(12, 64, generator=random).tolist(), "labels": TEXT["labels"]},
    ),
    "a classifier of texts": (
        partial(llama, hf.LlamaForSequenceClassification, num_labels=3), CLASSES | {"position_ids": POSITIONS}
    ),
    "types of tokens": (gpt2, TEXT | {"token_type_ids": HALVES, "position_ids": POSITIONS}),
    "bert: a class": (
        partial(bert, hf.BertForSequenceClassification, num_labels=3),
        CLASSES | {"position_ids": POSITIONS, "token_type_ids": HALVES, "attention_mask": MASK},
    ),
    "bert: a label a token": (
        partial(bert, hf.BertForTokenClassification, num_labels=3),
        TEXT
        | {"labels": partial(tokens, below=3), "position_ids": POSITIONS, "token_type_ids": HALVES}
        | {"attention_mask": [1] * 12},
    ),
    "bert: a span": (partial(bert, hf.BertForQuestionAnswering), SPAN | {"token_type_ids": HALVES}),
    "bert: a span, a mask": (
        partial(bert, hf.BertForQuestionAnswering), SPAN | {"position_ids": POSITIONS, "attention_mask": MASK}
    ),
    "llama: a span": (partial(llama, hf.LlamaForQuestionAnswering), SPAN | {"attention_mask": MASK}),
    "a mask of the decoder": (
        t5, TEXT | {"labels": partial(tokens, 7), "attention_mask": MASK, "decoder_attention_mask": [1] * 5 + [0] * 2}
    ),
    "tokens of the decoder": (t5, TEXT | {"labels": partial(tokens, 7), "decoder_input_ids": partial(tokens, 7)}),
}  # fmt: skip


def drawn(columns: Columns, count: int = 12) -> list[Columns]:
    random.manual_seed(5)
    return [{name: column() if callable(column) else column for name, column in columns.items()} for _ in range(count)]


def losses(model: nn.Module, folder: Path, data: list[Columns], **settings: Any) -> list[float]:
    """Of two steps that change nothing, and of an evaluation."""
    run = trainer(model, folder, data, steps=2, lr=0.0, per_device_train_batch_size=2, **settings)
    run.train()
    return [*run.losses, run.evaluate(data)["eval_loss"]]  # type: ignore[arg-type]


@pytest.mark.parametrize("case", first_is_quick(list(CASES)))
def test_a_column_counts_as_for_the_base_model(case: str, tmp_path: Path) -> None:
    make, columns = CASES[case]
    torch.manual_seed(0)
    base = make()
    compiled = peftc.compile(base, LORA)
    randomise(compiled)
    found, expected = (losses(model, tmp_path, drawn(columns)) for model in (compiled, compiled.merge()))
    assert len(found) == 3
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_accumulated_gradients_are_means_over_all_tokens(tmp_path: Path) -> None:
    columns = TEXT | {"position_ids": POSITIONS, "labels": lambda: [-100] * one(8) + tokens(12)}
    data = [row | {"labels": row["labels"][:12]} for row in drawn(columns)]
    compiled = peftc.compile(llama(), LORA)
    settings = {"gradient_accumulation_steps": 3}
    found, expected = (losses(model, tmp_path, data, **settings) for model in (compiled, compiled.merge()))
    assert len(found) == 7
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("with_positions", [False, True])
def test_what_was_called_before_changes_nothing(order: tuple[int, ...], with_positions: bool) -> None:
    """Without a mask positions tell texts apart, and with one they do not: none is filled in for them."""
    torch.manual_seed(0)
    batch = {name: torch.tensor([column] * 2) for name, column in drawn(TEXT, 1)[0].items()}
    batch |= {"position_ids": torch.tensor([POSITIONS] * 2), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    compiled = peftc.compile(llama(), LORA, example=batch if with_positions else None)
    randomise(compiled)
    merged = compiled.merge()
    merged.config.use_cache = False  # type: ignore[union-attr]  # as a Trainer sets it: there are no texts with a cache
    calls = [{name: batch[name] for name in batch if name != left_out} for left_out in ("", *list(batch)[2:])]
    expected = [merged(**call).loss.item() for call in calls]
    assert expected[0] != pytest.approx(expected[2], abs=1e-4)
    for place in order:
        assert compiled(**calls[place]).loss.item() == pytest.approx(expected[place], abs=1e-5)


def test_no_mask_is_made_of_embeddings() -> None:
    base = llama()
    compiled = peftc.compile(base, LORA)
    batch = {"inputs_embeds": torch.randn(2, 5, 64), "labels": torch.ones(2, 5, dtype=torch.long)}
    for mask in (torch.ones(2, 5, dtype=torch.long), None):
        expected = base(**batch, attention_mask=mask).loss
        torch.testing.assert_close(compiled(**batch, attention_mask=mask).loss, expected)


def test_forward_names_what_the_base_models_does() -> None:
    base = bert(hf.BertForQuestionAnswering)
    compiled = peftc.compile(base, LORA)
    for model in (compiled, copy.deepcopy(compiled)):
        named = inspect.signature(model.forward).parameters
        assert list(named)[:3] == ["input_ids", "attention_mask", "token_type_ids"]
        taken = inspect.signature(base.forward).parameters.values()
        assert {each.name for each in taken if each.kind is not each.VAR_KEYWORD} == set(named)
        assert all(each.default is None for name, each in named.items() if name != "input_ids")


@pytest.mark.parametrize("asked", [{"logits_to_keep": 1}, {"output_hidden_states": True}])
def test_beside_other_inputs_nothing_is_dropped_either(asked: dict[str, Any]) -> None:
    compiled = peftc.compile(llama(), LORA)
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(TypeError, match=next(iter(asked))):
        compiled(input_ids=ids, position_ids=torch.arange(5).expand(2, 5), **asked)


class Weighted(nn.Module):
    """A model of no library, with an input that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None = None) -> dict[str, Any]:
        losses = (self.fc(x) - labels).pow(2).mean(-1)
        return {"loss": (losses if weight is None else losses * weight).mean()}


def test_a_column_of_a_plain_module_is_refused_where_its_example_has_none(tmp_path: Path) -> None:
    example = {"x": torch.randn(2, 6), "labels": torch.randn(2, 4)}
    data = [{"x": [0.5] * 6, "labels": [1.0] * 4, "weight": 2.0}] * 8
    with pytest.raises(TypeError, match=r"no input weight.*pass example="):
        losses(peftc.compile(Weighted(), "apply lora(r=2) to linear", example=example), tmp_path, data)
    whole = peftc.compile(Weighted(), "apply lora(r=2) to linear", example=example | {"weight": torch.ones(2)})
    assert losses(whole, tmp_path, data) == pytest.approx(losses(whole.base, tmp_path, data), abs=1e-6)
