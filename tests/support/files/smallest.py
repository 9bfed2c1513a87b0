"""A chat model's folder, small enough to stand in for a real one where a page of the documentation is run."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def folder_of_a_tiny_chat_model(folder: Path) -> Path:
    """A random Llama of two layers that reads bytes, and its tokenizer with a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end, start, stop = SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=stop, unk_token=end, pad_token=stop,
        additional_special_tokens=SPECIAL, chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=384, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
