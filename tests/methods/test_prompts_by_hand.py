"""Prompts against the base model given the embeddings by hand, put in front or added; and inputs that can have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import peftc
from promptcases import LENGTH, NEAR, PROMPT, by_hand, compiled, padded
from zoo import ENCODER, TOKENS, ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow


def seeded(model: Any, config: Any, **settings: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built: PreTrainedModel = model(config(**settings)).eval()
        return built


BERT = {**ENCODER, "type_vocab_size": 3}
GPT2 = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64}


def same_as_by_hand(model: PreTrainedModel, batch: dict[str, Tensor], example: Any = None) -> peftc.CompiledModule:
    ours = peftc.compile(model, f"apply prompt(length={LENGTH})", example=example).eval()
    prompt = ours.get_parameter(PROMPT)
    mine, expected = ours(**batch), by_hand(model, prompt, batch)
    torch.testing.assert_close(mine.loss, expected.loss, rtol=NEAR, atol=NEAR)
    logits = expected.logits
    if logits.dim() == 3 and logits.shape[1] != mine.logits.shape[1]:
        logits = logits[:, LENGTH:]
    torch.testing.assert_close(mine.logits, logits, rtol=NEAR, atol=NEAR)
    (wanted,) = torch.autograd.grad(expected.loss, prompt)
    (found,) = torch.autograd.grad(mine.loss, prompt)
    torch.testing.assert_close(found, wanted, rtol=NEAR, atol=NEAR)
    return ours


def test_token_types_and_classes_of_tokens() -> None:
    """BERT's token types (0 for a prompt), and a label a token, which a prompt's tokens have none of."""
    model = seeded(hf.BertForTokenClassification, hf.BertConfig, **BERT, num_labels=4)
    batch = padded(model, "right")
    batch["token_type_ids"] = torch.arange(9).remainder(3).expand(3, -1)
    batch["labels"] = torch.where(batch["attention_mask"] > 0, batch["input_ids"] % 4, -100)
    same_as_by_hand(model, batch)


def test_a_masked_language_model() -> None:
    """RoBERTa counts its positions from tokens that are not padding; so do a prompt's."""
    model = ZOO["roberta"]().eval()
    same_as_by_hand(model, inputs(model, 3, 9))


def test_positions_that_the_caller_gives() -> None:
    """A prompt has positions 0 … k-1, and the caller's come behind it."""
    model = ZOO["llama"]().eval()
    batch = padded(model, "left")
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    example = {**inputs(model, 2, 8), "position_ids": torch.arange(8).expand(2, -1)}
    same_as_by_hand(model, batch, example)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_classifier_that_reads_the_last_token(side: str) -> None:
    """GPT-2 looks for the last token that is no padding: a prompt's stand-in is none, whichever token pads.

    HF PEFT, which has no tokens any more there, reads the last place, and so padding where it stands at the right.
    """
    model = seeded(hf.GPT2ForSequenceClassification, hf.GPT2Config, **GPT2, num_labels=3)
    batch = padded(model, side)
    ours = peftc.compile(model, f"apply prompt(length={LENGTH})").eval()
    prompt = ours.get_parameter(PROMPT)
    logits = ours(**batch).logits
    expected = by_hand(model, prompt, batch).logits
    if side == "right":
        kept = [batch["input_ids"][row][batch["attention_mask"][row] > 0][None] for row in range(3)]
        alone = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in kept]
        expected = torch.cat([by_hand(model, prompt, row).logits for row in alone])
    torch.testing.assert_close(logits, expected, rtol=NEAR, atol=NEAR)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_without_labels(name: str) -> None:
    ours, batch = compiled(name, f"apply prompt(length={LENGTH})"), padded(ZOO[name](), "right")
    with torch.no_grad():
        logits = ours(**batch).logits
        del batch["labels"]
        assert torch.equal(ours(**batch).logits, logits)
        if name != "bert":
            assert logits.shape[1] == batch["input_ids"].shape[1]


@pytest.mark.parametrize("front", [True, False])
def test_an_image_gets_its_prompt_among_its_patches(front: bool) -> None:
    """Visual prompt tuning puts it behind the class token; no position is left there, so any place is the same."""
    model = ZOO["vit"]().eval()
    ours = peftc.compile(model, "apply prompt(length=3)").eval()
    prompt, batch = ours.get_parameter(PROMPT), inputs(model, 3)
    at = 1 if front else 6

    def insert(_module: nn.Module, _given: Any, x: Tensor) -> Tensor:
        return torch.cat([x[:, :at], prompt.expand(len(x), -1, -1), x[:, at:]], 1)

    mine = ours(**batch)
    with model.get_submodule("vit.embeddings").register_forward_hook(insert):
        expected = model(**batch)
    torch.testing.assert_close(mine.logits, expected.logits, rtol=NEAR, atol=NEAR)
    (wanted,) = torch.autograd.grad(expected.loss, prompt)
    (found,) = torch.autograd.grad(mine.loss, prompt)
    torch.testing.assert_close(found, wanted, rtol=NEAR, atol=NEAR)


class CausalLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleDict({part: nn.Linear(24, 24) for part in "qkvo"})
        self.wide, self.narrow = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.projections[part](x).unflatten(-1, (2, 12)).transpose(1, 2) for part in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.projections["o"](mixed)
        return x + torch.as_tensor(self.narrow(F.gelu(self.wide(x))))


class Causal(nn.Module):
    """A series of numbers, of which each place sees those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CausalLayer() for _ in range(2))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return torch.as_tensor(self.head(x))


def test_a_causal_series_gets_its_prompt_in_front() -> None:
    torch.manual_seed(0)
    model = Causal()
    x = torch.randn(2, 6, 24)
    ours = peftc.compile(model, "apply prompt(length=3)", example=x)
    prompt, given = ours.get_parameter(PROMPT), torch.randn(4, 6, 24)
    expected = model(torch.cat([prompt.expand(4, -1, -1), given], 1))[:, 3:]
    torch.testing.assert_close(ours(given), expected, rtol=NEAR, atol=NEAR)


# ---- Added, not put in front ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("length", [4, 20])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_an_added_prompt_is_its_formula(name: str, length: int, side: str) -> None:
    """Row i on the i-th token that is no padding, one row at a time; tokens from `length` on stay as they are."""
    ours = compiled(name, f"apply prompt(mode=add, length={length})")
    model = ZOO[name]().eval()
    batch = padded(model, side)
    prompt = ours.get_parameter(PROMPT)
    with torch.no_grad():
        prompt.copy_(torch.randn(prompt.shape, generator=torch.Generator().manual_seed(0)))
    x = model.get_input_embeddings()(batch["input_ids"]).detach().clone()
    for row, mask in zip(x, batch["attention_mask"], strict=True):
        for i, place in enumerate(mask.nonzero().flatten()[:length]):
            row[place] = row[place] + prompt.detach()[i]
    given = {key: tensor for key, tensor in batch.items() if key != "input_ids"}
    with torch.no_grad():
        expected = model(inputs_embeds=x, **given)
        torch.testing.assert_close(ours(**batch).loss, expected.loss, rtol=NEAR, atol=NEAR)
        torch.testing.assert_close(ours(**batch).logits, expected.logits, rtol=NEAR, atol=NEAR)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_an_added_prompt_starts_as_the_base(name: str) -> None:
    """Bit for bit, where no fused norm rounds otherwise."""
    model = ZOO[name]().eval()
    ours = peftc.compile(model, "apply prompt(mode=add, length=4)", fuse=False).eval()
    batch = inputs(model, 3)
    with torch.no_grad():
        assert torch.equal(ours(**batch).logits, model(**batch).logits)


# ---- What cannot be --------------------------------------------------------------------------------------------------


def test_an_input_that_counts_places_is_refused() -> None:
    """Where an answer starts and ends would be places of the lengthened input."""
    model = seeded(hf.BertForQuestionAnswering, hf.BertConfig, **BERT)
    example = {**inputs(ZOO["bert"](), 2, 8), "start_positions": torch.zeros(2, dtype=torch.long)}
    example["end_positions"] = example.pop("labels")
    with pytest.raises(peftc.PeftcError, match="start_positions is for a prompt is not known"):
        peftc.compile(model, "apply prompt", example=example)


def test_a_model_without_a_sequence_is_refused() -> None:
    with pytest.raises(peftc.PeftcError) as raised:
        peftc.compile(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), "apply prompt", example=torch.randn(2, 3))
    assert [diagnostic.code for diagnostic in raised.value.diagnostics] == ["no-sequence"]


def test_a_fixed_length_that_is_also_a_width_is_refused() -> None:
    with pytest.raises(peftc.PeftcError, match="length of 24 is also another size"):
        peftc.compile(Causal(), "apply prompt", example=torch.randn(2, 24, 24))
