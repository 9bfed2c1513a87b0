"""What eager mode makes of a prompt: embeddings in front of those of the tokens, as a model takes them itself.

Where there are images or sounds as well, whose places in the text a model looks for among its tokens, the prompt stands
over the embeddings of plain tokens in front.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sweep.batches import Batch

PLAIN = 5
TEXT = {"input_ids", "attention_mask", "labels", "decoder_input_ids", "decoder_attention_mask"}


def prompted(base: PreTrainedModel, prompt: Tensor, batch: Batch) -> Any:
    """The results for `batch` behind `prompt`, of its own length; None where a model takes no embeddings, or says more
    of each token than that it is one.
    """
    takes = inspect.signature(base.forward).parameters
    tokens: Any = batch.get("input_ids")
    besides = [batch[name] for name in batch.keys() - TEXT if torch.is_tensor(batch[name])]
    if tokens is None or "inputs_embeds" not in takes or any(one.shape[-2:] == tokens.shape for one in besides):
        return None
    two_sided, length = base.config.is_encoder_decoder, len(prompt)
    reader = base.get_encoder() if two_sided else base
    table = reader.get_input_embeddings()
    given = {name: value for name, value in batch.items() if name != "input_ids"}
    for name, filled in (("attention_mask", 1), *(() if two_sided else (("labels", -100),))):
        if name in given:
            given[name] = torch.nn.functional.pad(given[name], (length, 0), value=filled)
    caches = {"use_cache": False} if "use_cache" in takes else {}

    def behind(embedded: Tensor) -> Tensor:
        return torch.cat([prompt.to(embedded.dtype).expand(len(tokens), *prompt.shape), embedded], 1)

    if not besides:
        result = base(inputs_embeds=behind(table(tokens)), **given, **caches)
    else:
        tokens = torch.nn.functional.pad(tokens, (length, 0), value=PLAIN)
        hook = table.register_forward_hook(lambda _module, _arguments, embedded: behind(embedded[:, length:]))
        try:
            result = base(input_ids=tokens, **given, **caches)
        finally:
            hook.remove()
    if not two_sided:
        result["logits"] = result["logits"][:, length:]
    return result
