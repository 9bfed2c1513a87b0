"""What tests beside HF PEFT's own models have in common."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

NEAR = 1e-5  # fp32, two implementations of one sum; of gradients, sums of such, twice that share of a tensor's largest


def quietly(function: Any, *given: Any, **named: Any) -> Any:
    """HF PEFT says what it does besides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*given, **named)


def shaken(model: Any) -> Any:
    """With state that is no start: a zero B would hide what is wrong with A."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """What a folder of HF PEFT holds."""
    return safetensors.torch.load((folder / "adapter_model.safetensors").read_bytes())
