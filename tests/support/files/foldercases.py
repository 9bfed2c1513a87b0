"""Models with heads, and HF PEFT's own adapters for them, to be written and read both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from torch import Tensor

from hfpeft import quietly, shaken

VOCABULARY = 97
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
      "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}  # fmt: skip
DISTIL = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}


def _seeded(model: Any, config: Any, **settings: Any) -> Callable[[], Any]:
    def build() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model(config(**settings)).eval()

    return build


MODELS: dict[str, Callable[[], Any]] = {
    "llama": _seeded(hf.LlamaForCausalLM, hf.LlamaConfig, **SIZES),
    "llama tied": _seeded(hf.LlamaForCausalLM, hf.LlamaConfig, **SIZES, tie_word_embeddings=True),
    "llama classes": _seeded(hf.LlamaForSequenceClassification, hf.LlamaConfig, **SIZES, num_labels=3),
    "bert classes": _seeded(hf.BertForSequenceClassification, hf.BertConfig, **SIZES, num_labels=3),
    "bert tokens": _seeded(hf.BertForTokenClassification, hf.BertConfig, **SIZES, num_labels=5),
    "bert answers": _seeded(hf.BertForQuestionAnswering, hf.BertConfig, **SIZES),
    "roberta classes": _seeded(hf.RobertaForSequenceClassification, hf.RobertaConfig, **SIZES, num_labels=3),
    "distilbert classes": _seeded(hf.DistilBertForSequenceClassification, hf.DistilBertConfig, **DISTIL, num_labels=3),
    "gpt2": _seeded(hf.GPT2LMHeadModel, hf.GPT2Config, **GPT2),
    "gpt2 tokens": _seeded(hf.GPT2ForTokenClassification, hf.GPT2Config, **GPT2, num_labels=3),
    "t5": _seeded(hf.T5ForConditionalGeneration, hf.T5Config, **T5),
}
TWO = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"], "roberta": ["query", "value"],
       "distilbert": ["q_lin", "v_lin"], "gpt2": ["c_attn"], "t5": ["q", "v"]}  # fmt: skip


def two_of(name: str) -> list[str]:
    """The ends of names of two layers in each block of a model."""
    return TWO[name.partition(" ")[0]]


def batch(model: Any) -> dict[str, Tensor]:
    """What every one of the models takes."""
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {})


def theirs_in(folder: Path, base: Any, config: Any) -> Any:
    """HF PEFT's own model, and its folder."""
    torch.manual_seed(0)
    made = shaken(quietly(peft.get_peft_model, base, config))
    quietly(made.save_pretrained, folder)
    return made


def logits(model: Any) -> Tensor:
    """All that a model says of `batch`."""
    with torch.no_grad():
        said = model(**batch(model))
    if "start_logits" in said:
        return torch.cat([said.start_logits, said.end_logits], -1)
    found: Tensor = said.logits
    return found
