"""Inputs that a model may take: it is asked, and the first that it takes are its example."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

BATCH, LENGTH = 2, 8


@dataclass(frozen=True)
class Draft:
    """Inputs by name. `fixed` are those whose numbers decide how the model computes, such as the sizes of images.

    Those that are `likely` are tried with the model's numbers, if it does not take them without.
    """

    given: dict[str, Tensor] = field(default_factory=dict)
    fixed: dict[str, Tensor] = field(default_factory=dict)
    likely: bool = False

    def __str__(self) -> str:
        return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in (self.given | self.fixed).items())

    def plus(self, more: Mapping[str, Tensor], **fixed: Tensor) -> Draft:
        """With other inputs besides."""
        return replace(self, given={**self.given, **more}, fixed={**self.fixed, **fixed})


@dataclass(frozen=True)
class Subject:
    """A model that inputs are made for, and what it says of them."""

    model: PreTrainedModel

    @property
    def config(self) -> PretrainedConfig:
        """Its configuration, which may have others in it."""
        config: PretrainedConfig = self.model.config
        return config

    @property
    def main(self) -> str:
        """The input that it cannot do without."""
        return str(self.model.main_input_name)

    @property
    def accepts(self) -> Mapping[str, inspect.Parameter]:
        """What its forward takes, by name."""
        return inspect.signature(type(self.model).forward).parameters

    @property
    def needed(self) -> list[str]:
        """What its forward does not do without."""
        return [name for name, parameter in self.accepts.items() if parameter.default is inspect.Parameter.empty]

    def numbers(self, *shape: int) -> Tensor:
        """Ones in the model's own precision: an image of zeros is padding to some."""
        return torch.ones(shape, device=self.model.device, dtype=self.model.dtype)

    def counts(self, *shape: int, value: int = 1) -> Tensor:
        """Whole numbers that are all the same."""
        return torch.full(shape, value, dtype=torch.long, device=self.model.device)
