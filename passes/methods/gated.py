"""A learned gate over what another method adds."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from peftc.combinator import Combinator
from peftc.method import REQUIRED, Method, State, method, param


@method
class Gated(Combinator):
    """How much of a method's change is let through, decided at every position by what enters there.

    UniPELT's authors average the gate over the positions of a sequence. In a causal model that would show each token
    the ones behind it, so here every position has its own, as the paper's formula has it.
    """

    name = "gated"
    formula = "y + sigmoid(w x + b) (f(y) - y), f the method"
    paper = "Mao et al. 2021 (UniPELT), arXiv:2110.07577"

    unmergeable = "its gate depends on what enters the layer"

    method: Method = param(REQUIRED, "what is gated")

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.unmergeable = type(self).unmergeable

    def refuses(self, site: Any) -> str | None:
        if self.method.rewrites_input(site):
            return f"{self.method.name} changes the input here, and a gate needs an output"
        return super().refuses(site)

    def state(self, site: Any) -> dict[str, State]:
        start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
        entering = getattr(site, "n_in", None) or site.entry_width
        return super().state(site) | {"w": State((1, entering), start), "b": State((1,))}

    def rewrite(self, site: Any, x: Tensor, y: Tensor, **known: Tensor) -> Tensor:
        gate = _gate(x, known["w"], known["b"]).reshape(*y.shape[:-1], 1)
        changed = self.inner_output(site, x, y, known)
        return y + (gate * (changed - y)).to(y.dtype)

    def mix(self, site: Any, x: Tensor, y: Tensor, changed: Tensor, w: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        """y: [batch, heads, tokens, width], or with the heads in the batch; one gate a token for all its heads."""
        gate = _gate(x, w, b).reshape(-1, 1, y.shape[-2], 1)
        if y.dim() == 3:
            gate = gate.expand(-1, site.heads, -1, -1).flatten(0, 1)
        return y + (gate * (changed - y)).to(y.dtype)


def _gate(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(linear(x.to(w.dtype), w, b))
