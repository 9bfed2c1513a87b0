"""Whether another class of transformers computes what a model does, so that a file may be read back as that one.

llama.cpp has one architecture for several of transformers' classes, which differ in their name alone as far as the
settings of one model go. That is asked of two thin models, which have the widths and settings of the whole ones.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

THIN = {"num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 64}
NEAR = 1e-5  # of logits in fp32


def computes_the_same(model: PreTrainedModel, config: PreTrainedConfig) -> bool:
    """Whether a causal model made by `config` has parameters of the same names and shapes, and the same logits."""
    try:
        with torch.device("meta"):
            one, other = type(model)(_thin(model.config)), AutoModelForCausalLM.from_config(_thin(config))
        if _shapes(one) != _shapes(other):
            return False
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            one, other = type(model)(_thin(model.config)), AutoModelForCausalLM.from_config(_thin(config))
            other.load_state_dict(one.float().state_dict())
            ids = torch.randint(0, THIN["vocab_size"], (2, 9))
            mine, theirs = (thin.float().eval()(input_ids=ids, use_cache=False).logits for thin in (one, other))
    except Exception:  # of settings that no thin model can have
        return False
    return torch.allclose(mine, theirs, rtol=NEAR, atol=NEAR)


def _thin(config: PreTrainedConfig) -> PreTrainedConfig:
    made: Any = copy.deepcopy(config)
    for name, size in THIN.items():
        if getattr(made, name, None) is not None:
            setattr(made, name, min(size, getattr(made, name)))
    if isinstance(getattr(made, "layer_types", None), list):
        made.layer_types = made.layer_types[: THIN["num_hidden_layers"]]
    made.pad_token_id = made.bos_token_id = made.eos_token_id = None
    return made  # type: ignore[no-any-return]


def _shapes(model: Any) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
