"""A batch to measure on, from a seed: random token ids that are their own labels, nothing masked; or random images.

What a model's factory gives as its example is taken as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftc.capture.inputs import example_inputs

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def batch_for(model: nn.Module, given: Any, batch: int, seq: int, seed: int = 0) -> Arguments:
    """Arguments of `model`'s forward: `batch` examples of `seq` tokens.

    Args:
        model: a transformers model, or one with an example of its own. On the meta device so are the arguments.
        given: that example, which is used as it is; None for a transformers model.
        batch: how many examples.
        seq: how many tokens, where the model takes tokens; an encoder-decoder model takes as many on both sides.
        seed: of the random ids, pixels and classes.
    """
    example = example_inputs(model, given)
    if given is not None or not isinstance(model, PreTrainedModel):
        return example.args, dict(example.kwargs)
    random = torch.Generator().manual_seed(seed)
    made: dict[str, Any] = {}
    for name, tensor in example.kwargs.items():
        shape = (batch, seq, *tensor.shape[2:]) if _counts_tokens(tensor) else (batch, *tensor.shape[1:])
        made[name] = (
            tensor.new_empty(shape) if tensor.is_meta else _filled(model, name, tensor, shape, random).to(tensor.device)
        )
    if "input_ids" in made and "labels" in made and made["labels"].shape == made["input_ids"].shape:
        made["labels"] = made["input_ids"].clone()
    return (), made | example.constants


def _counts_tokens(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_floating_point()


def _filled(model: PreTrainedModel, name: str, like: Tensor, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """One argument: numbers where the model takes numbers, ids that are no padding, ones or zeros as the example."""
    if like.is_floating_point():
        return torch.randn(shape, generator=random).to(like.dtype)
    if _counts_tokens(like):
        if name == "labels" or (name.endswith("ids") and name != "token_type_ids"):
            config = model.config.get_text_config()
            padding = getattr(config, "pad_token_id", None)
            ids = torch.randint(config.vocab_size, shape, generator=random)
            return ids if padding is None else torch.where(ids == padding, (ids + 1) % config.vocab_size, ids)
        return like[:1, :1].cpu().expand(shape).clone()
    return torch.randint(model.config.num_labels or 1, shape, generator=random)
