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

    method: Method = param(REQUIRED, "what is gated")

    outermost = True

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.unmergeable = "its gate depends on what enters the layer"

    def refuses(self, site: Any) -> str | None:
        if self.method.rewrites_input(site):
            return f"{self.method.name} changes the input here, and a gate needs an output"
        return super().refuses(site)

    def state(self, site: Any) -> dict[str, State]:
        start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
        entering = getattr(site, "n_in", None) or site.entry_width
        return super().state(site) | {"w": State((1, entering), start), "b": State((1,))}

    def rewrite(self, site: Any, x: Tensor, y: Tensor, **known: Tensor) -> Tensor:
        gate = torch.sigmoid(linear(x.to(known["w"].dtype), known["w"], known["b"])).reshape(*y.shape[:-1], 1)
        changed = self.inner_output(site, x, y, known)
        return y + (gate * (changed - y)).to(y.dtype)
