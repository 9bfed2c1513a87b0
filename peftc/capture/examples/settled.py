"""Inputs that a graph does not read: sizes of images, which it is made for, and what positions are made of.

Where an image's rows and columns stand in the positions of its tokens, the model's own method tells them
(`get_rope_index`), from the numbers of the inputs: it is called before the graph is, and its answer is an input.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftc.capture.texts import POSITIONS

# The names by which transformers passes how many rows and columns images have.
SIZES = re.compile(r"(_grid_(thw|hw)|^image_sizes|^spatial_shapes|^target_sizes|_merge_sizes)$")
METHOD, MODALITIES = "get_rope_index", "mm_token_type_ids"


def are_sizes(name: str, value: Any) -> bool:
    """Whether an input's numbers decide how a model computes."""
    return SIZES.search(name) is not None and isinstance(value, Tensor) and not value.is_floating_point()


@dataclass(frozen=True)
class Settled:
    """What is done with the inputs of a call before a graph is given them.

    fixed      the sizes that the graph is for
    positions  the model's method that makes positions, if it has one
    """

    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    positions: Callable[..., Any] | None = None

    @classmethod
    def of(cls, model: nn.Module, constants: Mapping[str, Any]) -> Settled:
        """For a graph of `model` with some constants."""
        fixed = {name: value for name, value in constants.items() if are_sizes(name, value)}
        found = (getattr(module, METHOD, None) for module in model.modules())
        return cls(fixed, next((method for method in found if method is not None), None))

    def with_positions(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs with the positions of what they show, instead of the kinds of the tokens that these came from."""
        told = given.get(MODALITIES) is not None and any(are_sizes(name, value) for name, value in given.items())
        if self.positions is None or not told or given.get(POSITIONS) is not None:
            return dict(given)
        takes = inspect.signature(self.positions).parameters
        made: Tensor = self.positions(**{name: value for name, value in given.items() if name in takes})[0]
        rest = {name: value for name, value in given.items() if name != MODALITIES}
        return {**rest, POSITIONS: made.to(given["input_ids"].device)}

    def without_sizes(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs less those of the sizes that the graph is for."""
        return {
            name: value for name, value in given.items() if name not in self.fixed or not _same(value, self.fixed[name])
        }

    def lacks(self, given: Mapping[str, Any]) -> list[str]:
        """The sizes that a call does not say."""
        return [name for name in self.fixed if name not in given]


def _same(value: Any, fixed: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == fixed.shape and torch.equal(value.cpu(), fixed)
