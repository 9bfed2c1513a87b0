"""A matrix as one Kronecker product."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from peftc.protocol import Tensor, torch
from peftc.protocol.method import State
from peftc.protocol.parameterisation import Parameterisation, param, parameterisation


@parameterisation
class Kron(Parameterisation):
    """Blocks that are multiples of one block: A has side `a` (its nearest divisor, where that does not divide)."""

    name = "kron"
    formula = "W = A (x) B, A [a1, a2], B [n_out/a1, n_in/a2]"
    paper = "Edalati et al. 2022, arXiv:2212.10650"

    a: int = param(8, "rows and columns of A; the largest divisor of a side that is no larger", min=1)

    def _side(self, n: int) -> int:
        return next(d for d in range(min(self.a, n), 0, -1) if n % d == 0)

    def state(self, n_out: int, n_in: int, *, zero: bool) -> dict[str, State]:
        rows, columns = self._side(n_out), self._side(n_in)
        start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
        b_start = torch.nn.init.zeros_ if zero else start
        return {"A": State((rows, columns), start), "B": State((n_out // rows, n_in // columns), b_start)}

    def dense(self, state: Mapping[str, Tensor]) -> Tensor:
        return torch.kron(state["A"], state["B"])

    def apply(self, x: Tensor, bias: Tensor | None, state: Mapping[str, Tensor]) -> Tensor:
        a, b = state["A"], state["B"]
        # x as [..., a2, b2]: (A (x) B) x is A X Bᵀ, row by row
        blocks = a @ (x.unflatten(-1, (a.shape[1], b.shape[1])) @ b.t())
        flat: Tensor = blocks.flatten(-2)
        return flat if bias is None else flat + bias
