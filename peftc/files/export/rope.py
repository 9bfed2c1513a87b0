"""Rotary positions whose frequencies are not the plain ones, as a GGUF file says them.

llama.cpp divides its own frequencies theta^(-2i/n) by one number for all, or by a tensor `rope_freqs`, as its converter
writes it for Llama 3.1 and later. transformers' reader looks at neither, so that they come from the model's own
frequencies and not from how a setting calls them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel

NAME = f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight"
SETTING = "rope_parameters"


@dataclass(frozen=True)
class Slowed:
    """What each frequency is divided by: `factors` [n/2] fp32."""

    factors: Tensor

    @property
    def alike(self) -> float | None:
        """The one number, where they are all the same."""
        first = float(self.factors[0])
        return first if torch.allclose(self.factors, self.factors[:1], rtol=1e-5) else None

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Adds the one number to a file."""
        if self.alike is not None:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(self.alike)


def slowed(model: PreTrainedModel, architecture: str) -> Slowed | None:
    """How a model's frequencies are not the plain ones; None where they are, or where that is not all that is done.

    As where they follow the length of a text, what is rotated is scaled, too, or files of `architecture` have no such
    tensor.
    """
    rotations: list[Any] = [module for module in model.modules() if hasattr(module, "inv_freq")]
    settings = getattr(model.config, SETTING, None) or {}
    named = str(settings.get("rope_type"))
    follows_length = "dynamic" in named or named == "longrope"  # as transformers' `dynamic_rope_update` tells
    if len(rotations) != 1 or follows_length or "rope_theta" not in settings:
        return None
    if getattr(rotations[0], "attention_scaling", None) != 1:
        return None
    frequencies = rotations[0].inv_freq.double().cpu()
    places = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
    factors = (settings["rope_theta"] ** -places / frequencies).float()
    if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5):
        return None
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    found = Slowed(factors)
    has_tensor = gguf.MODEL_TENSOR.ROPE_FREQS in gguf.MODEL_TENSORS[kinds[architecture]]
    return found if found.alike is not None or has_tensor else None
