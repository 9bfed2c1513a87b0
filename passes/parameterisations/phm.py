"""A matrix as a sum of Kronecker products: parameterised hypercomplex multiplication."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State
from peftc.protocol.parameterisation import Parameterisation, param, parameterisation


@parameterisation
class PHM(Parameterisation):
    """n small matrices A_i, which all layers may share, each with a block B_i of low rank or full."""

    name = "phm"
    formula = "W = sum_i A_i (x) B_i, A_i [n, n], B_i [n_out/n, n_in/n], B_i = s_i t_i if rank is given"
    paper = "Karimi Mahabadi et al. 2021, arXiv:2106.04647; Zhang et al. 2021, arXiv:2102.08597"

    n: int = param(4, "how many products, and the side of each A_i; divides both sides of the matrix", min=1)
    rank: int | None = param(None, "rank of each B_i; B_i is dense if it is not given", min=1)
    shared: bool = param(False, "one set of A_i for all the statement's matrices")

    def refuses(self, n_out: int, n_in: int) -> str | None:
        if n_out % self.n or n_in % self.n:
            return f"n={self.n} of phm does not divide both sides of a {n_out}x{n_in} matrix"
        if self.rank is not None and self.rank > min(n_out, n_in) // self.n:
            return f"a rank of {self.rank} is more than a {n_out // self.n}x{n_in // self.n} block has"
        return None

    def state(self, n_out: int, n_in: int, *, zero: bool) -> dict[str, State]:
        rows, columns = n_out // self.n, n_in // self.n
        state = {} if self.shared else {"A": self._rules()}
        if self.rank is None:
            return state | {"B": State((self.n, rows, columns), _start(zero, n_in))}
        s = State((self.n, rows, self.rank), _start(zero, self.rank))
        return state | {"s": s, "t": State((self.n, self.rank, columns), _start(False, n_in))}

    def common(self, shapes: Sequence[tuple[int, int]]) -> dict[str, State]:
        return {"A": self._rules()} if self.shared else {}

    def _rules(self) -> State:
        return State((self.n, self.n, self.n), partial(torch.nn.init.normal_, std=self.n**-0.5))

    def dense(self, state: Mapping[str, Tensor]) -> Tensor:
        blocks = state["B"] if self.rank is None else state["s"] @ state["t"]
        products = torch.einsum("ipq,ioc->poqc", state["A"], blocks)
        return products.flatten(2).flatten(0, 1)

    def apply(self, x: Tensor, bias: Tensor | None, state: Mapping[str, Tensor]) -> Tensor:
        if self.rank is None:
            return F.linear(x, self.dense(state), bias)
        rules, s, t = state["A"], state["s"], state["t"]
        # [..., q, i, r]: each of the n parts of x through every t_i; the rules mix the parts; every s_i widens them
        narrow = F.linear(x.unflatten(-1, (self.n, -1)), t.flatten(0, 1)).unflatten(-1, (self.n, self.rank))
        mixed = torch.einsum("ipq,...qir->...pir", rules, narrow)
        wide: Tensor = F.linear(mixed.flatten(-2), s.transpose(0, 1).flatten(1))
        flat = wide.flatten(-2)
        return flat if bias is None else flat + bias


def _start(zero: bool, fan_in: int) -> partial[Tensor]:
    """As a linear layer of `fan_in` inputs starts, or at zero."""
    bound = 0.0 if zero else fan_in**-0.5
    return partial(torch.nn.init.uniform_, a=-bound, b=bound)
