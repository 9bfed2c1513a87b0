"""What eager mode makes of a prompt: embeddings in front of those of the tokens, as a model takes them itself."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sweep.batches import Batch

TEXT = {"input_ids", "attention_mask", "labels", "decoder_input_ids", "decoder_attention_mask"}


def prompted(base: PreTrainedModel, prompt: Tensor, batch: Batch) -> Any:
    """The results for `batch` behind `prompt`, of its own length; None where a model takes more than tokens, or none
    as embeddings.
    """
    takes = inspect.signature(base.forward).parameters
    tokens = batch.get("input_ids")
    if tokens is None or "inputs_embeds" not in takes or batch.keys() - TEXT - {"use_cache"}:
        return None
    two_sided, length = base.config.is_encoder_decoder, len(prompt)
    reader = base.get_encoder() if two_sided else base
    embedded = reader.get_input_embeddings()(tokens)
    front = prompt.to(embedded.dtype).expand(len(tokens), *prompt.shape)
    given = {name: value for name, value in batch.items() if name != "input_ids"}
    for name, filled in (("attention_mask", 1), *(() if two_sided else (("labels", -100),))):
        if name in given:
            given[name] = torch.nn.functional.pad(given[name], (length, 0), value=filled)
    caches = {"use_cache": False} if "use_cache" in takes else {}
    result = base(inputs_embeds=torch.cat([front, embedded], 1), **given, **caches)
    if not two_sided:
        result["logits"] = result["logits"][:, length:]
    return result
