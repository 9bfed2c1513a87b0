"""Granular low-rank adaptation."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.params import divisors_near
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod


@method
class GraLoRA(WeightMethod):
    """A grid of k x k blocks of the weight, each with a LoRA of rank r/k of its own; r numbers a row, as in LoRA.

    A[n] [n_in/k, r] reads the n-th part of x for all k blocks of a column, B[m] [r, n_out/k] writes the m-th part of y
    from all k blocks of a row. A LoRA of the whole weight, of rank hybrid_r, may stand beside them.
    """

    name = "gralora"
    formula = "y_m = W_m x + s sum_n B_mn A_mn x_n, s = alpha/(r + hybrid_r)"
    paper = "Jung et al. 2025, arXiv:2505.20355"
    peft_type = "GRALORA"
    peft_bias = "gralora_only"
    peft_values: ClassVar = {
        "r": "r", "alpha": "alpha", "gralora_k": "k", "hybrid_r": "hybrid_r", "gralora_dropout": "dropout",
    }  # fmt: skip

    r: int = param(32, "rank of the blocks of a row together", min=1, alias="rank")
    alpha: float = param(64.0, "the branch is scaled by alpha/(r + hybrid_r)", above=0)
    k: int = param(2, "rows and columns of the grid", min=1, alias="gralora_k")
    hybrid_r: int = param(0, "rank of the LoRA beside the grid; 0: none", min=0)
    dropout: float = param(0.0, "dropout on x, in training", min=0, max=0.99)

    @property
    def scale(self) -> float:
        """The factor of the branch."""
        return self.alpha / (self.r + self.hybrid_r)

    def conflict(self) -> str | None:
        return None if self.r % self.k == 0 else f"r={self.r} is divided among k={self.k} blocks of a row"

    def refuses(self, site: Linear) -> str | None:
        common = math.gcd(site.n_in, site.n_out)
        near = divisors_near(common, self.k)
        return f"k={self.k} does not divide both {site.n_in} and {site.n_out}: {near} do" if common % self.k else None

    def state(self, site: Linear) -> dict[str, State]:
        wide = site.n_in // self.k, site.n_out // self.k
        state = {"A": State((self.k, wide[0], self.r), _uniform), "B": State((self.k, self.r, wide[1]))}
        if self.hybrid_r:
            state["general_A"] = State((self.hybrid_r, site.n_in), _uniform)
            state["general_B"] = State((site.n_out, self.hybrid_r))
        return state

    def _branch(
        self, x: Tensor, A: Tensor, B: Tensor, general_A: Tensor | None = None, general_B: Tensor | None = None
    ) -> Tensor:
        inner = torch.einsum("...ni,nir->...nr", x.unflatten(-1, (self.k, -1)), A)
        crossed = inner.unflatten(-1, (self.k, -1)).transpose(-2, -3).flatten(-2)  # what each row of blocks gets
        branch = torch.einsum("...mr,mro->...mo", crossed, B).flatten(-2)
        if general_A is not None and general_B is not None:
            branch = branch + F.linear(F.linear(x, general_A), general_B)
        return self.scale * branch

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, **state: Tensor) -> Tensor:
        x = x.to(state["A"].dtype)
        return y + self._branch(F.dropout(x, self.dropout) if self.dropout else x, **state).to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        return self._branch(torch.eye(site.n_in, dtype=state["A"].dtype, device=state["A"].device), **state).t()

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings, _ = super().to_peft(site, state)
        return settings, {theirs: state[ours] for theirs, ours in _names(self.hybrid_r).items()}

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        names = _names(config.get("hybrid_r", 0))
        if set(tensors) != set(names):
            return None
        values = {ours: config[theirs] for theirs, ours in cls.peft_values.items() if theirs in config}
        return values, {ours: tensors[theirs] for theirs, ours in names.items()}


def _names(hybrid: int) -> dict[str, str]:
    general = {"gralora_A_general.weight": "general_A", "gralora_B_general.weight": "general_B"}
    return {"gralora_A": "A", "gralora_B": "B"} | (general if hybrid else {})


def _uniform(tensor: Tensor) -> Tensor:
    """Within 1/sqrt(n) of the n features it reads: the last dimension but one of a grid, the last of a plain one."""
    bound = tensor.shape[-2 if tensor.dim() == 3 else -1] ** -0.5
    return tensor.uniform_(-bound, bound)
