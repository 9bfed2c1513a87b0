"""Low-rank adaptation with a Hadamard product."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod

from ..sites.conv import Conv, core, core_keeps, planar


@method
class LoHa(WeightMethod):
    """The entrywise product of two low-rank matrices beside a frozen weight: rank r^2 from 2 r (n_in + n_out) numbers.

    B1 A1 is `w1_a @ w1_b`, B2 A2 is `w2_a @ w2_b`, as LyCORIS and HF PEFT name them. The product of two matrices of
    rank r is one of rank r^2 whose factors are the row-wise and column-wise Kronecker (Khatri-Rao) products of theirs:

        (B1 A1) * (B2 A2) = K(B1, B2) K(A1, A2),  K(B1, B2)[o, (i, j)] = B1[o, i] B2[o, j]

    so the step is that of a LoRA of rank r^2, and no matrix of the weight's size is made. At a convolution it is: the
    kernel's, [n_out, n_in / groups * its numbers], or, with `tucker`, each factor has a core of the kernel's size, `t1`
    [r, r, *kernel] between `w1_a` and `w1_b`.
    """

    name = "loha"
    formula = "y = W x + (alpha/r) ((B1 A1) * (B2 A2)) x"
    paper = "Hyeon-Woo et al. 2022 (FedPara), arXiv:2108.06098; Yeh et al. 2023 (LyCORIS), arXiv:2309.14859"
    peft_type = "LOHA"
    peft_tensors: ClassVar = {"hada_w1_a": "w1_a", "hada_w1_b": "w1_b", "hada_w2_a": "w2_a", "hada_w2_b": "w2_b"}
    peft_values: ClassVar = {
        "r": "r", "alpha": "alpha", "rank_dropout": "rank_dropout", "module_dropout": "module_dropout",
        "use_effective_conv2d": "tucker",
    }  # fmt: skip
    site = Linear | Conv
    peft_patterns: ClassVar = {"r": "rank_pattern", "alpha": "alpha_pattern"}
    peft_transposed = False

    r: int = param(8, "rank of each of the two products", min=1, alias="rank")
    alpha: float = param(8.0, "the branch is scaled by alpha/r", above=0)
    rank_dropout: float = param(0.0, "share of the branch's outputs left out of a step, in training", min=0, max=0.99)
    module_dropout: float = param(0.0, "how often a step leaves out the whole branch, in training", min=0, max=0.99)
    tucker: bool = param(False, "a core for the kernel, of convolutions larger than 1", alias="use_effective_conv2d")

    @property
    def scale(self) -> float:
        """The factor of the entrywise product."""
        return self.alpha / self.r

    def factored(self, site: Linear | Conv) -> bool:
        """Whether two products of rank r^2 need fewer operations than one with the dense matrix.

        For each token r^2 (n_in + n_out) against n_in n_out multiplications, in the forward pass and in each half of
        the backward pass alike: below r = 45 on 4096 x 4096, below r = 17 on 576 x 576.
        """
        return self.r**2 * (site.n_in + site.n_out) < site.n_in * site.n_out

    def state(self, site: Linear | Conv) -> dict[str, State]:
        start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
        out, entering = (site.n_out, self.r), (self.r, site.n_in)
        cores: dict[str, State] = {}
        if isinstance(site, Conv) and self.tucker and site.taps > 1:
            out, entering = (self.r, site.n_out), (self.r, site.each)
            cores = {name: State((self.r, self.r, *planar(site)), start) for name in ("t1", "t2")}
        elif isinstance(site, Conv):
            entering = (self.r, site.each * site.taps)
        return {
            "w1_a": State(out, start), "w1_b": State(entering, start),
            "w2_a": State(out, start), "w2_b": State(entering), **cores,
        }  # fmt: skip

    def rewrite(
        self, site: Linear | Conv, x: Tensor, y: Tensor, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor,
        t1: Tensor | None = None, t2: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        x = x.to(w1_a.dtype)
        if isinstance(site, Conv):
            cores = {} if t1 is None or t2 is None else {"t1": t1, "t2": t2}
            kernel = self.delta(site, w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b, **cores)
            branch = site.convolve(x, kernel)
        elif self.factored(site):
            into = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)  # [r^2, n_in]
            out = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1, 2)  # [n_out, r^2]
            branch = F.linear(F.linear(x, into), self.scale * out)
        else:
            branch = F.linear(x, ((self.scale * w1_a) @ w1_b) * (w2_a @ w2_b))
        return y + self._thinned(site, branch).to(y.dtype)

    def _thinned(self, site: Linear | Conv, branch: Tensor) -> Tensor:
        """Rows of the change left out, the others scaled up to the same mean; or all of it, and nothing scaled."""
        if self.rank_dropout:
            kept = F.dropout(branch.new_ones(site.n_out), self.rank_dropout)
            kept = kept / kept.mean().clamp_min(1e-6)
            branch = branch * (site.beside(kept) if isinstance(site, Conv) else kept)
        if self.module_dropout:
            branch = branch * (F.dropout(branch.new_ones(1), self.module_dropout) > 0)
        return branch

    def delta(self, site: Linear | Conv, **state: Tensor) -> Tensor:
        first, second = (core(state[f"w{n}_a"], state[f"w{n}_b"], state.get(f"t{n}")) for n in (1, 2))
        change = self.scale * first * second
        return change.reshape(site.shape) if isinstance(site, Conv) else change

    def keeps(self, site: Linear | Conv) -> int | None:
        return 0 if isinstance(site, Conv) else None

    def keeps_dense(self, site: Linear | Conv) -> int:
        """The two factors and their product, and what the factors are made of."""
        if not isinstance(site, Conv):
            return 0
        cores = 2 * core_keeps(site.n_out, self.r, site.taps) if self.tucker and site.taps > 1 else 0
        return 3 * math.prod(site.shape) + cores

    def unexportable(self, site: Linear | Conv) -> str | None:
        deep = isinstance(site, Conv) and len(site.kernel) > 2
        return "it has LoHa on no convolution in three dimensions" if deep else super().unexportable(site)

    def to_peft(self, site: Linear | Conv, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings, tensors = super().to_peft(site, state)
        return settings, tensors | {f"hada_{name}": state[name] for name in ("t1", "t2") if name in state}

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        cores = {name: tensors[f"hada_{name}"] for name in ("t1", "t2") if f"hada_{name}" in tensors}
        rest = {name: tensor for name, tensor in tensors.items() if name.removeprefix("hada_") not in cores}
        found = super().from_peft(config, module, rest)
        return None if found is None else (found[0], found[1] | cores)
