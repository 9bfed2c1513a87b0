"""Tiny causal models with tokenizers of their own, as folders, to export; and compiled ones that have learned."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data import topics
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import peftc

TOKENS = 400
COMMON: dict[str, Any] = {
    "vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 64,
}  # fmt: skip
SPECIAL = ["<s>", "<|endoftext|>"]


def tiny(kind: str) -> PreTrainedModel:
    """A random model of a kind, seed 0, no weight of which is as it starts."""
    torch.manual_seed(0)
    made: Any
    match kind:
        case "llama":
            made = LlamaForCausalLM(LlamaConfig(**COMMON))
        case "mistral":
            made = MistralForCausalLM(MistralConfig(**COMMON, sliding_window=None))
        case "qwen2":
            made = Qwen2ForCausalLM(Qwen2Config(**COMMON, tie_word_embeddings=True))
        case "qwen3":
            made = Qwen3ForCausalLM(Qwen3Config(**COMMON))
        case "gemma2":
            made = Gemma2ForCausalLM(Gemma2Config(**COMMON, head_dim=256, sliding_window=16))
        case "phi3":
            made = Phi3ForCausalLM(Phi3Config(**COMMON))
        case "gpt2":
            config = GPT2Config(vocab_size=TOKENS, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
            made = GPT2LMHeadModel(config)
        case _:
            raise ValueError(kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    made.eval()
    return cast(PreTrainedModel, made)


def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes spelt as letters, learned from Python's help."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS - 8, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(list(topics.topics.values())[:20], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[1]
    )


def sentencepiece_like(*, adds_space: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer as sentencepiece's, with a byte for what it has no letter for; spaces are letters, one in front."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=TOKENS - 280, show_progress=False)
    made.train_from_iterator([text[:4000] for text in list(topics.topics.values())[:20]], trainer)
    learned = made.get_vocab()
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(learned, key=learned.__getitem__)]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in json.loads(made.to_str())["model"]["merges"]]
    whole = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    whole.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if adds_space else spaces
    whole.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, unk_token="<unk>", bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[1]
    )


def folder_of(kind: str, folder: Path) -> Path:
    """A tiny model's folder, with a tokenizer."""
    tiny(kind).save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


def learned(compiled: peftc.CompiledModule) -> peftc.CompiledModule:
    """With state that is no start: a zero B would hide what is wrong with A."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in compiled.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return compiled.eval()
