"""Bottleneck adapters, behind a sublayer or beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from peftc.method import Method, Stage, State, method, param
from peftc.site import Module

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@method
class Adapter(Method):
    """A small two-layer network with a residual, before the sublayer's own residual add."""

    name = "adapter"
    formula = "h + s U f(D h), or h + s U f(D x) in parallel; x enters the sublayer, h leaves it"
    paper = "Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021; He et al. 2022, arXiv:2110.04366"
    site = Module
    stage = Stage.MODULE
    unmergeable = "its activation stands between two layers, so no single weight does the same"

    size: int | None = param(None, "width of the bottleneck", min=1, alias="bottleneck")
    reduction: int | None = param(None, "width as the model's divided by this; 16 if neither is given", min=1)
    at: str = param("sequential", "on the sublayer's output, or beside it", choices=("sequential", "parallel"))
    activation: str = param("relu", "f", choices=tuple(ACTIVATIONS))
    scale: float = param(1.0, "s", above=0)
    dropout: float = param(0.0, "dropout on the bottleneck, in training", min=0, max=0.99)
    bias: bool = param(True, "whether D and U have biases")

    def conflict(self) -> str | None:
        if self.size is not None and self.reduction is not None:
            return "size and reduction say the same thing: give one of them"
        return None

    def refuses(self, site: Module) -> str | None:
        if self.size is None and site.width < (self.reduction or 16):
            return f"a width of {site.width} leaves nothing at reduction={self.reduction or 16}: give size="
        return None

    def state(self, site: Module) -> dict[str, State]:
        width = self.size or site.width // (self.reduction or 16)
        start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
        entering = site.width if self.at == "sequential" else site.entry_width
        state = {"down": State((width, entering), start), "up": State((site.width, width))}
        if self.bias:
            state |= {"down_bias": State((width,)), "up_bias": State((site.width,))}
        return state

    def rewrite(
        self, site: Module, x: Tensor, y: Tensor, down: Tensor, up: Tensor,
        down_bias: Tensor | None, up_bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        entering = (y if self.at == "sequential" else x).to(down.dtype)
        inner = ACTIVATIONS[self.activation](F.linear(entering, down, down_bias))
        if self.dropout:
            inner = F.dropout(inner, self.dropout)
        branch = F.linear(inner, up, up_bias) * self.scale
        return y + branch.reshape(y.shape).to(y.dtype)
