"""A matrix as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State
from peftc.protocol.parameterisation import Parameterisation, parameterisation


@parameterisation
class Dense(Parameterisation):
    """Every entry is a parameter."""

    name = "dense"
    formula = "W"
    paper = ""

    def state(self, n_out: int, n_in: int, *, zero: bool) -> dict[str, State]:
        start = torch.nn.init.zeros_ if zero else partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
        return {"": State((n_out, n_in), start)}

    def dense(self, state: Mapping[str, Tensor]) -> Tensor:
        return state[""]

    def apply(self, x: Tensor, bias: Tensor | None, state: Mapping[str, Tensor]) -> Tensor:
        return F.linear(x, state[""], bias)
