"""What the prompts' tests share: padded batches, HF PEFT's models, and the base model given the embeddings by hand.

Nothing here is square: widths, lengths of prompts and inputs, and batches all differ from those of the capture.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import PreTrainedModel

import peftc
from zoo import ZOO, inputs

LENGTH = 5
# fp32, the same operations in another order
NEAR = 1e-5
PROMPT = "sequence.prompt.embedding"


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
