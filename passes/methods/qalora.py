"""Quantisation-aware low-rank adaptation."""

from __future__ import annotations

import math
from functools import partial

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.params import divisors_near
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod


@method
class QALoRA(WeightMethod):
    """Low-rank adaptation of the sums of x over each group of inputs, as quantised weights are grouped.

    A is [r, n_in / group], and all inputs of a group share its column: the change of a weight row is one number a
    group, which a group-wise quantised weight takes into its zero-points without error. Algorithm 1 of the paper
    pools by the mean and multiplies by the group's size, so what A reads is the sum.
    """

    name = "qalora"
    formula = "y = W x + (alpha/r) B A pool(x), pool: the sum over each group of inputs"
    paper = "Xu et al. 2023, arXiv:2309.14717"

    r: int = param(8, "rank of the product", min=1, alias="rank")
    alpha: float = param(16.0, "the branch is scaled by alpha/r", above=0)
    group: int = param(32, "inputs that share a column of A; the quantisation's group; must divide the inputs", min=1)
    dropout: float = param(0.0, "dropout on x, in training", min=0, max=0.99)

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / self.r

    def refuses(self, site: Linear) -> str | None:
        if site.n_in % self.group:
            near = divisors_near(site.n_in, self.group)
            return f"group={self.group} does not divide its {site.n_in} inputs: {near} do"
        return None

    def state(self, site: Linear) -> dict[str, State]:
        start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
        return {"A": State((self.r, site.n_in // self.group), start), "B": State((site.n_out, self.r))}

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, A: Tensor, B: Tensor) -> Tensor:
        x = F.dropout(x.to(A.dtype), self.dropout) if self.dropout else x.to(A.dtype)
        pooled = x.unflatten(-1, (A.shape[1], self.group)).sum(-1)
        branch: Tensor = self.scale * F.linear(F.linear(pooled, A), B)
        return y + branch.to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        return self.scale * (state["B"] @ state["A"]).repeat_interleave(self.group, dim=1)
