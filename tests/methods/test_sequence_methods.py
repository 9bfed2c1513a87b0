"""Prompts: against HF PEFT where it has them, else against the base model given the embeddings by hand.

Nothing here is square: widths, lengths of prompts and inputs, and batches all differ from those of the capture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers as hf
from torch import Tensor, fx, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import peftc
from zoo import ENCODER, TOKENS, ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

LENGTH = 5
# fp32, the same operations in another order
NEAR = 1e-5
PROMPT = "sequence.prompt.embedding"
TASKS = {
    "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "opt": "CAUSAL_LM", "gemma2": "CAUSAL_LM", "gemma3": "CAUSAL_LM",
    "bloom": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM",
}  # fmt: skip


@cache
def compiled(name: str, spec: str) -> peftc.CompiledModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peftc.compile(ZOO[name](), spec).eval()


def padded(model: PreTrainedModel, side: str, batch: int = 3, length: int = 9) -> dict[str, Tensor]:
    """A batch whose rows have different lengths; the second one is whole."""
    given = inputs(model, batch, length)
    if side == "none":
        return given
    mask = given["attention_mask"]
    for row, missing in ((0, 4), (2, 1)):
        mask[row, slice(0, missing) if side == "left" else slice(length - missing, None)] = 0
    given["input_ids"] = torch.where(mask > 0, given["input_ids"], model.config.pad_token_id)
    if given["labels"].shape == mask.shape:
        given["labels"] = torch.where(mask > 0, given["labels"], -100)
    return given


def of_hf_peft(name: str, config: peft.PeftConfig) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return peft.get_peft_model(ZOO[name](), config).eval()


def compare(ours: peftc.CompiledModule, theirs: Any, batch: dict[str, Tensor], names: dict[str, str]) -> None:
    """Loss, the logits of the caller's positions, and the gradient of everything named: ours -> theirs."""
    ours.zero_grad()
    mine, other = ours(**batch), theirs(**batch)
    torch.testing.assert_close(mine.loss, other.loss, rtol=NEAR, atol=NEAR)
    logits = other.logits
    if logits.dim() == 3 and mine.logits.dim() == 3:
        logits = logits[:, -mine.logits.shape[1] :]
    torch.testing.assert_close(mine.logits, logits, rtol=NEAR, atol=NEAR)
    mine.loss.backward()
    other.loss.backward()
    expected = dict(theirs.prompt_encoder["default"].named_parameters())
    for own, name in names.items():
        gradient = ours.get_parameter(own).grad
        assert gradient is not None
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, expected[name].grad, rtol=NEAR, atol=NEAR)


# ---- Against HF PEFT ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", [pytest.param(name) for name in TASKS])
def test_prompt_tuning_as_in_hf_peft(name: str, side: str) -> None:
    ours = compiled(name, f"apply prompt(length={LENGTH})")
    config = peft.PromptTuningConfig(task_type=TASKS[name], num_virtual_tokens=LENGTH, num_transformer_submodules=1)
    theirs = of_hf_peft(name, config)
    with torch.no_grad():
        ours.get_parameter(PROMPT).copy_(theirs.prompt_encoder["default"].embedding.weight)
    compare(ours, theirs, padded(ZOO[name](), side), {PROMPT: "embedding.weight"})


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_p_tuning_as_in_hf_peft(name: str, encoder: str) -> None:
    ours = compiled(name, f"apply ptuning(length={LENGTH}, encoder={encoder}, hidden=7)")
    config = peft.PromptEncoderConfig(
        task_type=TASKS[name], num_virtual_tokens=LENGTH, num_transformer_submodules=1, encoder_hidden_size=7,
        encoder_reparameterization_type=encoder.upper(),
    )  # fmt: skip
    theirs = of_hf_peft(name, config)
    state = theirs.prompt_encoder["default"].state_dict()
    names = {f"sequence.ptuning.{key}": key for key in state}
    assert names.keys() == ours.trainable_parameters().keys()
    ours.load_state_dict({own: state[key] for own, key in names.items()})
    compare(ours, theirs, padded(ZOO[name](), "left"), names)


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize(("name", "side"), [("llama", "left"), ("gpt2", "none"), ("opt", "left")])
def test_generated_text_is_that_of_hf_peft(name: str, side: str) -> None:
    ours = compiled(name, f"apply prompt(length={LENGTH})")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    theirs = of_hf_peft(name, config)
    with torch.no_grad():
        ours.get_parameter(PROMPT).copy_(theirs.prompt_encoder["default"].embedding.weight)
    batch = padded(theirs.base_model, side)
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    expected = theirs.generate(**given, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours.generate(**given, max_new_tokens=8), expected)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("llama", f"apply prompt(length={LENGTH})"),
        ("bert", f"apply prompt(length={LENGTH})"),
        ("t5", f"apply prompt(length={LENGTH})"),
        ("llama", f"apply ptuning(length={LENGTH}, hidden=7)"),
        ("gpt2", f"apply ptuning(length={LENGTH}, hidden=7, encoder=mlp)"),
    ],
)
def test_hf_peft_reads_the_folder_and_it_comes_back(name: str, spec: str, tmp_path: Path) -> None:
    """A P-tuning encoder is folded away: what is written is the prompt that came out of it."""
    ours = compiled(name, spec)
    batch = padded(ZOO[name](), "left")
    ours.save_pretrained(tmp_path / "adapter")
    written = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    heads = {f"base_model.classifier.{part}" for part in ("weight", "bias")} if name == "bert" else set()
    assert written.keys() == {"prompt_embeddings", *heads}
    theirs = peft.PeftModel.from_pretrained(ZOO[name](), str(tmp_path / "adapter")).eval()
    back = peftc.load_peft(ZOO[name](), tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = ours(**batch).logits
        other = theirs(**batch).logits
        other = other[:, -logits.shape[1] :] if other.dim() == 3 else other
        torch.testing.assert_close(other, logits, rtol=NEAR, atol=NEAR)
        torch.testing.assert_close(back(**batch).logits, logits, rtol=NEAR, atol=NEAR)


def test_a_folder_of_hf_peft_with_rows_for_a_decoder(tmp_path: Path) -> None:
    """By default HF PEFT keeps 2 k rows for an encoder-decoder model, and the first k go before the encoder's input."""
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH)
    theirs = of_hf_peft("t5", config)
    theirs.save_pretrained(str(tmp_path))
    ours = peftc.load_peft(ZOO["t5"](), tmp_path).eval()
    assert ours.get_parameter(PROMPT).shape == (LENGTH, 32)
    batch = padded(ZOO["t5"](), "right")
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=NEAR, atol=NEAR)


# ---- Against the base model, given the embeddings by hand ----------------------------------------------------------


def by_hand(model: PreTrainedModel, prompt: Tensor, batch: dict[str, Tensor]) -> Any:
    """The base model on [prompt, embeddings], with everything else lengthened as the methods' table says."""
    given = dict(batch)
    x = model.get_input_embeddings()(given.pop("input_ids"))
    rows, k = len(x), len(prompt)

    def behind(name: str, filler: Tensor) -> None:
        if name in given:
            given[name] = torch.cat([filler.expand(rows, -1), given[name]], 1)

    behind("attention_mask", torch.ones(k, dtype=torch.long))
    behind("token_type_ids", torch.zeros(k, dtype=torch.long))
    if "position_ids" in given:
        given["position_ids"] = given["position_ids"] + k
        behind("position_ids", torch.arange(k))
    if given.get("labels", torch.zeros(0)).shape[:2] == x.shape[:2]:
        behind("labels", torch.full((k,), -100))
    return model(inputs_embeds=torch.cat([prompt.expand(rows, -1, -1), x], 1), **given)


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


# ---- Starts ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Callable[[PreTrainedModel], PreTrainedModel]:
    """Puts a model where a tokenizer is: as if both had been loaded from one folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "classify", "this", "text", ":"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(str(tmp_path / "model"))

    def put(model: PreTrainedModel) -> PreTrainedModel:
        model.config._name_or_path = str(tmp_path / "model")
        return model

    return put


@pytest.mark.parametrize("length", [3, 11])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_start_from_text_is_that_of_hf_peft(
    name: str, length: int, with_tokenizer: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    """The tokens, those that the tokenizer adds included, over and over until the prompt is full."""
    model = with_tokenizer(ZOO[name]())
    ours = peftc.compile(model, f'apply prompt(length={length}, init="classify this text:")')
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=length, prompt_tuning_init="TEXT",
        prompt_tuning_init_text="classify this text:", tokenizer_name_or_path=model.config._name_or_path,
    )  # fmt: skip
    theirs = of_hf_peft(name, config)
    assert torch.equal(ours.get_parameter(PROMPT), theirs.prompt_encoder["default"].embedding.weight)


def test_a_start_from_text_without_a_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(peftc.PeftcError, match="init=vocab") as raised:
        peftc.compile(ZOO["llama"](), 'apply prompt(init="classify:")')
    assert [diagnostic.code for diagnostic in raised.value.diagnostics] == ["cannot-start"]


def test_what_was_saved_needs_no_tokenizer(
    tmp_path: Path, with_tokenizer: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    ours = peftc.compile(with_tokenizer(ZOO["llama"]()), 'apply prompt(length=3, init="classify:")')
    ours.save(tmp_path / "adapter")
    loaded = peftc.load(tmp_path / "adapter", ZOO["llama"]())
    assert torch.equal(loaded.get_parameter(PROMPT), ours.get_parameter(PROMPT))


def test_a_start_from_the_vocabulary() -> None:
    """Each row is the embedding of some token; of Gemma-2, before what its embedding module scales it by, as there."""
    model = ZOO["llama"]()
    prompt = peftc.compile(model, "apply prompt(length=6, init=vocab)").get_parameter(PROMPT)
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    assert all((table == row).all(1).any() for row in prompt)


# ---- Positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "positions"), [("gpt2", 64), ("bert", 64), ("opt", 64), ("roberta", 63)])
def test_a_prompt_takes_its_share_of_the_positions(name: str, positions: int) -> None:
    """The table of GPT-2 and BERT starts at the first row; OPT's has two rows more, and RoBERTa's leaves one out."""
    ours, model = compiled(name, f"apply prompt(length={LENGTH})"), ZOO[name]()
    room = positions - LENGTH
    with torch.no_grad():
        ours(**inputs(model, 2, room))
        with pytest.raises(peftc.PeftcError, match=f"{room + 1} tokens, .* leaves positions for {room}") as raised:
            ours(**inputs(model, 2, room + 1))
    assert [diagnostic.code for diagnostic in raised.value.diagnostics] == ["no-room"]


@pytest.mark.parametrize("name", ["llama", "t5", "bloom"])
def test_computed_positions_never_end(name: str) -> None:
    with torch.no_grad():
        compiled(name, f"apply prompt(length={LENGTH})")(**inputs(ZOO[name](), 2, 150))


# ---- Together with others, and what cannot be --------------------------------------------------------------------


def test_prompts_stand_in_file_order_and_share_the_input() -> None:
    """Each stands in front of the one before it; each block is still a module of its own."""
    model = ZOO["llama"]().eval()
    ours = peftc.compile(model, "apply prompt(length=3)\napply ptuning(length=4, encoder=mlp, hidden=6)").eval()
    assert all(isinstance(ours.get_submodule(f"model.layers.{layer}"), fx.GraphModule) for layer in (0, 1))
    batch = padded(model, "left")
    state = {name.removeprefix("sequence.ptuning."): tensor for name, tensor in ours.state_dict().items()}
    inner = state["embedding.weight"]
    for place in (0, 2, 4):
        inner = F.linear(
            inner.relu() if place else inner, state[f"mlp_head.{place}.weight"], state[f"mlp_head.{place}.bias"]
        )
    prompt = torch.cat([inner, ours.get_parameter(PROMPT)])
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).loss, by_hand(model, prompt, batch).loss, rtol=NEAR, atol=NEAR)


def test_a_prompt_over_adapted_blocks() -> None:
    """With random branches in the blocks: a prompt of the embeddings of tokens is those tokens in front."""
    rest = "apply lora(r=2) to attn.q, mlp.down\napply adapter(size=4) to mlp\ntrain norm"
    model = ZOO["llama"]().eval()
    ours = peftc.compile(model, f"apply prompt(length={LENGTH})\n{rest}").eval()
    plain = peftc.compile(model, rest).eval()
    random = torch.Generator().manual_seed(0)
    tokens = torch.arange(10, 10 + LENGTH)
    with torch.no_grad():
        for parameter in ours.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
        ours.get_parameter(PROMPT).copy_(model.get_input_embeddings()(tokens))
    plain.load_state_dict({name: tensor for name, tensor in ours.state_dict().items() if name != PROMPT})
    batch = padded(model, "left")
    in_front = {
        "input_ids": torch.cat([tokens.expand(3, -1), batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones(3, LENGTH, dtype=torch.long), batch["attention_mask"]], 1),
        "labels": torch.cat([torch.full((3, LENGTH), -100), batch["labels"]], 1),
    }
    mine, other = ours(**batch), plain(**in_front)
    mine.loss.backward()
    other.loss.backward()
    torch.testing.assert_close(mine.loss, other.loss, rtol=NEAR, atol=NEAR)
    for name, parameter in plain.trainable_parameters().items():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=NEAR, atol=NEAR)


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


def test_memory_counts_the_prompt() -> None:
    """The activations of a sequence of 96 with a prompt of 32 are those of a sequence of 128."""
    model = ZOO["llama"]()
    short, long = (peftc.plan(model, f"apply prompt(length={length})") for length in (1, 32))
    assert long.memory(2, 96).activations == short.memory(2, 127).activations
    assert long.memory(2, 96).activations > short.memory(2, 96).activations > 0


# ---- Intrinsic prompt tuning ----------------------------------------------------------------------------------------

SUBSPACE = "apply ipt(length=4, dim=3, hidden=16, learn=decoder, tasks=2)"


def task_batch(answer: int) -> dict[str, Tensor]:
    """A small task: whatever is asked, say one word."""
    batch = inputs(ZOO["llama"](), 4, 6)
    batch["labels"] = torch.full_like(batch["input_ids"], answer)
    return batch


def trained(module: peftc.CompiledModule, steps: int, batch: Callable[[int], dict[str, Tensor]]) -> float:
    optimizer = torch.optim.Adam(module.param_groups(lr=3e-2))
    loss = torch.zeros(())
    for step in range(steps):
        optimizer.zero_grad()
        loss = module(**batch(step)).loss
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def learn_subspace(folder: Path) -> peftc.CompiledModule:
    torch.manual_seed(0)
    module = peftc.compile(ZOO["llama"](), SUBSPACE)
    task = module.get_buffer("sequence.ipt.task")

    def batch(step: int) -> dict[str, Tensor]:
        task.copy_(F.one_hot(torch.tensor(step % 2), 2))
        return task_batch((10, 20)[step % 2])

    trained(module, 120, batch)
    module.save(folder)
    return module


def test_intrinsic_prompt_tuning_in_two_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three numbers in a subspace that two tasks were learned in do more than three numbers in a random one."""
    first = learn_subspace(tmp_path / "subspace")
    monkeypatch.chdir(tmp_path)
    losses = {}
    for where, more in (("learned", ', decoder="subspace"'), ("random", "")):
        torch.manual_seed(1)
        module = peftc.compile(ZOO["llama"](), f"apply ipt(length=4, dim=3, hidden=16{more})")
        assert list(module.trainable_parameters()) == ["sequence.ipt.z"]
        assert module.plan.trainable == 3
        if more:
            assert torch.equal(
                module.get_buffer("sequence.ipt.decoder.2.weight"), first.get_parameter("sequence.ipt.decoder.2.weight")
            )
        frozen = module.get_buffer("sequence.ipt.decoder.0.weight").clone()
        losses[where] = trained(module, 40, lambda _step: task_batch(20))
        assert torch.equal(module.get_buffer("sequence.ipt.decoder.0.weight"), frozen)
    assert losses["learned"] < losses["random"] - 0.2


def test_a_prompt_is_decoded_by_the_papers_formula() -> None:
    ours, model = (
        compiled("llama", "apply ipt(length=4, dim=3, hidden=16, learn=decoder, tasks=2)"),
        ZOO["llama"]().eval(),
    )
    state = {name.removeprefix("sequence.ipt."): tensor for name, tensor in ours.state_dict().items()}
    for task in (0, 1):
        ours.get_buffer("sequence.ipt.task").copy_(F.one_hot(torch.tensor(task), 2))
        z = state["z"][task]
        inner = [torch.tanh((state["decoder.0.weight"][j] * z).sum() + state["decoder.0.bias"][j]) for j in range(16)]
        flat = state["decoder.2.weight"] @ torch.stack(inner) + state["decoder.2.bias"]
        prompt = torch.stack([flat[32 * i : 32 * (i + 1)] for i in range(4)])
        batch = padded(model, "left")
        with torch.no_grad():
            torch.testing.assert_close(ours(**batch).loss, by_hand(model, prompt, batch).loss, rtol=NEAR, atol=NEAR)


def test_a_saved_second_phase_needs_the_first_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peftc.compile(ZOO["llama"](), SUBSPACE).save(tmp_path / "subspace")
    monkeypatch.chdir(tmp_path)
    module = peftc.compile(ZOO["llama"](), 'apply ipt(length=4, dim=3, hidden=16, decoder="subspace")').eval()
    module.save(tmp_path / "adapter")
    monkeypatch.chdir("/")
    loaded = peftc.load(tmp_path / "adapter", ZOO["llama"]()).eval()
    batch = inputs(ZOO["llama"]())
    assert torch.equal(loaded(**batch).logits, module(**batch).logits)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("missing", "there is no file missing"),
        ("../outside.safetensors", "lies outside"),
        ("link.safetensors", "lies outside"),
        ("text.safetensors", "is no safetensors file"),
        ("other.safetensors", "it has no tensor sequence.ipt.decoder.0.weight"),
        ("shape.safetensors", r"\[2, 2\], and \[16, 3\] is needed"),
        (".", "there is no file adapter.safetensors"),
    ],
)
def test_a_file_that_no_decoder_comes_out_of(file: str, reason: str, tmp_path: Path) -> None:
    folder = tmp_path / "specs"
    folder.mkdir()
    outside = tmp_path / "outside.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, outside)
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "text.safetensors").write_text("no tensors")
    safetensors.torch.save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    safetensors.torch.save_file({"sequence.ipt.decoder.0.weight": torch.zeros(2, 2)}, folder / "shape.safetensors")
    spec = folder / "phase2.peft"
    spec.write_text(f'apply ipt(length=4, dim=3, hidden=16, decoder="{file}")\n')
    with pytest.raises(peftc.PeftcError, match=reason) as raised:
        peftc.compile(ZOO["llama"](), spec)
    assert [diagnostic.code for diagnostic in raised.value.diagnostics] == ["bad-state-file"]


def test_copies_are_independent() -> None:
    """A copied module keeps its own prompt, and still knows how long its input may be."""
    ours = compiled("gpt2", f"apply prompt(length={LENGTH})")
    other = copy.deepcopy(ours)
    with torch.no_grad():
        other.get_parameter(PROMPT).zero_()
    assert ours.get_parameter(PROMPT).abs().max() > 0
    with pytest.raises(peftc.PeftcError, match="leaves positions"):
        other(**inputs(ZOO["gpt2"](), 2, 64))
