"""Prompts and P-tuning against HF PEFT: outputs, gradients, generated text, folders, and what prompts start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

import peftc
from promptcases import LENGTH, NEAR, PROMPT, compiled, of_hf_peft, padded
from zoo import ZOO

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

TASKS = {
    "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "opt": "CAUSAL_LM", "gemma2": "CAUSAL_LM", "gemma3": "CAUSAL_LM",
    "bloom": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM",
}  # fmt: skip


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
    # with a cache HF PEFT 0.21 looks for it by the name that transformers gave it before 5.24
    expected = theirs.generate(**given, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(ours.generate(**given, max_new_tokens=8, do_sample=False), expected)


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
