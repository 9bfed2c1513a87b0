"""Low-rank adaptation with a Hadamard product."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod


@method
class LoHa(WeightMethod):
    """The entrywise product of two low-rank matrices beside a frozen weight: rank r^2 from 2 r (n_in + n_out) numbers.

    B1 A1 is `w1_a @ w1_b`, B2 A2 is `w2_a @ w2_b`, as LyCORIS and HF PEFT name them. The product of two matrices of
    rank r is one of rank r^2 whose factors are the row-wise and column-wise Kronecker (Khatri-Rao) products of theirs:

        (B1 A1) * (B2 A2) = K(B1, B2) K(A1, A2),  K(B1, B2)[o, (i, j)] = B1[o, i] B2[o, j]

    so the step is that of a LoRA of rank r^2, and no matrix of the weight's size is made.
    """

    name = "loha"
    formula = "y = W x + (alpha/r) ((B1 A1) * (B2 A2)) x"
    paper = "Hyeon-Woo et al. 2022 (FedPara), arXiv:2108.06098; Yeh et al. 2023 (LyCORIS), arXiv:2309.14859"
    peft_type = "LOHA"
    peft_tensors: ClassVar = {"hada_w1_a": "w1_a", "hada_w1_b": "w1_b", "hada_w2_a": "w2_a", "hada_w2_b": "w2_b"}
    peft_values: ClassVar = {name: name for name in ("r", "alpha", "rank_dropout", "module_dropout")}
    peft_patterns: ClassVar = {"r": "rank_pattern", "alpha": "alpha_pattern"}
    peft_transposed = False

    r: int = param(8, "rank of each of the two products", min=1, alias="rank")
    alpha: float = param(8.0, "the branch is scaled by alpha/r", above=0)
    rank_dropout: float = param(0.0, "share of the branch's outputs left out of a step, in training", min=0, max=0.99)
    module_dropout: float = param(0.0, "how often a step leaves out the whole branch, in training", min=0, max=0.99)

    @property
    def scale(self) -> float:
        """The factor of the entrywise product."""
        return self.alpha / self.r

    def factored(self, site: Linear) -> bool:
        """Whether two products of rank r^2 need fewer operations than one with the dense matrix.

        For each token r^2 (n_in + n_out) against n_in n_out multiplications, in the forward pass and in each half of
        the backward pass alike: below r = 45 on 4096 x 4096, below r = 17 on 576 x 576.
        """
        return self.r**2 * (site.n_in + site.n_out) < site.n_in * site.n_out

    def state(self, site: Linear) -> dict[str, State]:
        start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
        return {
            "w1_a": State((site.n_out, self.r), start),
            "w1_b": State((self.r, site.n_in), start),
            "w2_a": State((site.n_out, self.r), start),
            "w2_b": State((self.r, site.n_in)),
        }

    def rewrite(
        self, site: Linear, x: Tensor, y: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor
    ) -> Tensor:
        x = x.to(w1_a.dtype)
        if self.factored(site):
            into = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)  # [r^2, n_in]
            out = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1, 2)  # [n_out, r^2]
            branch = F.linear(F.linear(x, into), self.scale * out)
        else:
            branch = F.linear(x, ((self.scale * w1_a) @ w1_b) * (w2_a @ w2_b))
        return y + self._thinned(branch).to(y.dtype)

    def _thinned(self, branch: Tensor) -> Tensor:
        """Rows of the change left out, the others scaled up to the same mean; or all of it, and nothing scaled."""
        if self.rank_dropout:
            kept = F.dropout(branch.new_ones(branch.shape[-1]), self.rank_dropout)
            branch = branch * (kept / kept.mean().clamp_min(1e-6))
        if self.module_dropout:
            branch = branch * (F.dropout(branch.new_ones(1), self.module_dropout) > 0)
        return branch

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        return self.scale * (state["w1_a"] @ state["w1_b"]) * (state["w2_a"] @ state["w2_b"])
