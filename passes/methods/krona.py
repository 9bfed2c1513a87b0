"""Kronecker adapters on a weight."""

from __future__ import annotations

import math
from functools import partial

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.params import divisors_near
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod


@method
class KronA(WeightMethod):
    """A Kronecker product A (x) B beside a frozen weight, of full rank where a low-rank product would be of rank 1.

    A is [a1, a2] and B [b1, b2], a1 b1 = n_out, a2 b2 = n_in (section 3 of the paper). With x read as a matrix
    X [a2, b2] in row-major order, (A (x) B) x is A X B^T: no matrix of the weight's size is made.
    """

    name = "krona"
    formula = "y = W x + s (A (x) B) x"
    paper = "Edalati et al. 2022, arXiv:2212.10650"

    a: int | None = param(
        None, "rows a1 of A; must divide the outputs; the divisor nearest to their square root if not given", min=1,
        alias="a1",
    )  # fmt: skip
    a2: int | None = param(None, "columns of A; must divide the inputs; as its rows if not given", min=1)
    scale: float = param(1.0, "s", above=0, alias="s")

    def _shape(self, site: Linear) -> tuple[int, int]:
        """(a1, a2)."""
        columns = self.a2 or self.a
        return self.a or _middle(site.n_out), columns or _middle(site.n_in)

    def refuses(self, site: Linear) -> str | None:
        rows, columns = self._shape(site)
        if site.n_out % rows:
            return f"a={rows} does not divide its {site.n_out} outputs: {divisors_near(site.n_out, rows)} do"
        if site.n_in % columns:
            as_rows = "" if self.a2 else " (as a is)"
            near = divisors_near(site.n_in, columns)
            return f"a2={columns}{as_rows} does not divide its {site.n_in} inputs: {near} do"
        return None

    def state(self, site: Linear) -> dict[str, State]:
        rows, columns = self._shape(site)
        start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
        return {"A": State((rows, columns), start), "B": State((site.n_out // rows, site.n_in // columns))}

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, A: Tensor, B: Tensor) -> Tensor:
        value = x.to(A.dtype).unflatten(-1, (A.shape[1], B.shape[1]))
        left = self.scale * A
        if B.shape[0] <= B.shape[1]:  # the narrower of X and X B^T meets A
            value = F.linear(F.linear(value, B).mT, left).mT
        else:
            value = F.linear(F.linear(value.mT, left).mT, B)
        return y + value.flatten(-2).to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        return self.scale * torch.kron(state["A"], state["B"])


def _middle(size: int) -> int:
    """The largest divisor of `size` that is not above its square root."""
    return max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
