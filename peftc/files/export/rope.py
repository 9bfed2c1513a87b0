"""Rotary positions whose frequencies are not the plain ones, as a GGUF file says them.

llama.cpp divides its own frequencies theta^(-2i/n) by one number for all, or by a tensor `rope_freqs`, as its converter
writes it for Llama 3.1 and later. transformers' reader looks at neither. Its models' own function of a setting says
what their frequencies are.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

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


def slowed(config: PreTrainedConfig, architecture: str) -> Slowed | None:
    """How a model's frequencies are not the plain ones; None where they are, or where that is not all that is done.

    As where they follow the length of a text, what is rotated is scaled, too, or files of `architecture` have no such
    tensor.
    """
    settings = getattr(config, SETTING, None) or {}
    named = str(settings.get("rope_type"))
    follows_length = "dynamic" in named or named == "longrope"  # as transformers' `dynamic_rope_update` tells
    if follows_length or named not in ROPE_INIT_FUNCTIONS or "rope_theta" not in settings:
        return None
    frequencies, scale = ROPE_INIT_FUNCTIONS[named](config, torch.device("cpu"))
    if scale != 1:
        return None
    places = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
    factors = (settings["rope_theta"] ** -places / frequencies.double()).float()
    if torch.allclose(factors, torch.ones_like(factors)):
        return None
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    found = Slowed(factors)
    has_tensor = gguf.MODEL_TENSOR.ROPE_FREQS in gguf.MODEL_TENSORS[kinds[architecture]]
    return found if found.alike is not None or has_tensor else None
