"""Batches that differ from a model's example in numbers, rows and length."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

Batch = dict[str, Any]


def varied(base: PreTrainedModel, example: Mapping[str, Any], rows: int, more: int, seed: int) -> Batch:
    """The example with other numbers: `rows` rows, texts longer by `more` tokens, padding in the first row."""
    random = torch.Generator().manual_seed(seed)
    text = example.get("input_ids")
    batch: Batch = {}
    for name, value in example.items():
        if not torch.is_tensor(value) or value.dim() == 0:
            batch[name] = value
            continue
        one = value
        if value.shape[0] == 2 and rows != 2:
            one = torch.cat([value, value[:1].expand(rows - 2, *value.shape[1:])])
        elif value.shape[0] % 2 == 0 and rows != 2:  # rows of patches, or images, of all texts in a row
            half = value[: value.shape[0] // 2]
            one = torch.cat([half] * rows)
        along_text = torch.is_tensor(text) and value.dim() >= 2 and value.shape[1] == text.shape[1]
        by_token = not value.is_floating_point() and value.dim() == 2
        if more and by_token and (along_text or "decoder" in name or name == "labels"):
            one = torch.cat([one, one[:, -1:].expand(-1, more)], 1)
        batch[name] = _drawn(base, name, one, random)
    mask = batch.get("attention_mask")
    if torch.is_tensor(mask) and mask.dim() == 2 and "input_ids" in batch and mask.shape == batch["input_ids"].shape:
        mask[0, -1 if base.config.is_encoder_decoder else 0] = 0
    return batch


def _drawn(base: PreTrainedModel, name: str, value: Tensor, random: torch.Generator) -> Tensor:
    if value.is_floating_point():
        drawn = torch.randn(value.shape, generator=random).to(value.dtype)
        return torch.cat([value[..., :2], drawn[..., 2:]], -1) if name == "flattened_patches" else drawn  # row, column
    if name == "labels" and value.dim() == 1:
        return torch.randint(0, 2, value.shape, generator=random)
    if name in ("input_ids", "decoder_input_ids", "labels"):
        special = _special_tokens(base.config)
        plain = torch.tensor([token for token in range(4, 64) if token not in special])
        drawn = plain[torch.randint(0, 20, value.shape, generator=random)]
        keep = torch.tensor([[int(t) in special or int(t) < 0 for t in row] for row in value.tolist()])
        return torch.where(keep, value, drawn)
    return value.clone()


def _special_tokens(config: Any) -> set[int]:
    found: set[int] = set()
    for name, value in vars(config).items():
        if type(value) is int and re.search("token_id|token_index", name):
            found.add(value)
        elif hasattr(value, "to_dict"):
            found |= _special_tokens(value)
    return found
