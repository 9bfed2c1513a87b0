"""A matrix as a product of two thin ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State
from peftc.protocol.parameterisation import Parameterisation, param, parameterisation


@parameterisation
class LowRank(Parameterisation):
    """Rank r at most; U is zero where the matrix starts at zero."""

    name = "lowrank"
    formula = "W = U V, U [n_out, r], V [r, n_in]"
    paper = "Karimi Mahabadi et al. 2021, arXiv:2106.04647 (its low-rank adapter)"

    rank: int = param(1, "r", min=1, alias="r")

    def refuses(self, n_out: int, n_in: int) -> str | None:
        if self.rank > min(n_out, n_in):
            return f"a rank of {self.rank} is more than a {n_out}x{n_in} matrix has"
        return None

    def state(self, n_out: int, n_in: int, *, zero: bool) -> dict[str, State]:
        start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
        u_start = torch.nn.init.zeros_ if zero else torch.nn.init.xavier_uniform_
        return {"U": State((n_out, self.rank), u_start), "V": State((self.rank, n_in), start)}

    def dense(self, state: Mapping[str, Tensor]) -> Tensor:
        return state["U"] @ state["V"]

    def apply(self, x: Tensor, bias: Tensor | None, state: Mapping[str, Tensor]) -> Tensor:
        return F.linear(F.linear(x, state["V"]), state["U"], bias)
