"""Orthogonal finetuning in the principal subspace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from peftc.protocol import F, Lazy, Tensor, torch
from peftc.protocol.method import PLAIN, Here, State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod

if TYPE_CHECKING:
    from peftc.kernels.common import orthogonal
else:
    orthogonal = Lazy("peftc.kernels.common.orthogonal")

NAMES = {"psoft_R.weight": "Q", "psoft_R.vector_a": "a", "psoft_R.vector_b": "b"}


@method
class PSOFT(WeightMethod):
    """The weight's r leading singular directions are turned among themselves, and scaled before and behind.

    A [r, n_in] and B [n_out, r], frozen, are the leading factors of the weight's singular value decomposition.
    """

    name = "psoft"
    formula = "y = W x + s B (diag(b) R diag(a) - I) A x, R = (I + Q)(I - Q)^-1, Q skew-symmetric, s B A = svd_r(W)"
    paper = "Wu et al. 2025, arXiv:2505.11235"
    peft_type = "PSOFT"
    peft_values: ClassVar = {
        "r": "r", "psoft_alpha": "alpha", "psoft_dropout": "dropout", "psoft_orth": "orthogonal",
        "psoft_mag_a": "before", "psoft_mag_b": "behind", "use_cayley_neumann": "neumann",
        "num_cayley_neumann_terms": "terms",
    }  # fmt: skip
    peft_settings = ("ab_svd_init", "psoft_svd", "psoft_svd_lowrank_niter", "random_seed")
    peft_transposed = False

    r: int = param(32, "singular directions", min=2, alias="rank")
    alpha: float = param(32.0, "the branch is scaled by alpha/r, and B by r/alpha", above=0, alias="psoft_alpha")
    dropout: float = param(0.0, "dropout on x, in training", min=0, max=0.99)
    orthogonal: bool = param(True, "R is orthogonal, and not any matrix", alias="psoft_orth")
    before: bool = param(True, "whether what R reads is scaled, by a", alias="psoft_mag_a")
    behind: bool = param(True, "whether what R writes is scaled, by b", alias="psoft_mag_b")
    values_in: str = param("B", "which has the singular values, or half of each (root)", choices=("B", "root"))
    neumann: bool = param(
        False, "the inverse is a Neumann series, and R all but orthogonal", alias="use_cayley_neumann"
    )
    terms: int = param(5, "terms of that series", min=1, max=64, alias="num_cayley_neumann_terms")

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.indivisible = None if self.orthogonal else "its R starts as the identity matrix, all of it"

    def conflict(self) -> str | None:
        if self.neumann and not self.orthogonal:
            return "neumann is of an orthogonal R, and orthogonal=false"
        if self.changed("terms") and not self.neumann:
            return f"terms={self.terms} is of a Neumann series: write neumann=true, too"
        return None

    @property
    def scale(self) -> float:
        """The factor of the branch."""
        return self.alpha / self.r

    def refuses(self, site: Linear) -> str | None:
        small = min(site.n_in, site.n_out)
        return f"r={self.r} is more than {small}, the smaller side of the weight" if self.r > small else None

    def state(self, site: Linear) -> dict[str, State]:
        turn = State((self.r * (self.r - 1) // 2,)) if self.orthogonal else State((self.r, self.r), torch.nn.init.eye_)
        scales = {name: State((self.r,), torch.nn.init.ones_) for name in self._scales()}
        frozen = {"A": State((self.r, site.n_in), trainable=False), "B": State((site.n_out, self.r), trainable=False)}
        return {"Q": turn, **scales, **frozen}

    def _scales(self) -> list[str]:
        return [name for name, there in (("a", self.before), ("b", self.behind)) if there]

    def initialise(self, site: Linear, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> None:
        left, singular, right = torch.linalg.svd(weight.float(), full_matrices=False)
        values = singular[: self.r] / self.scale
        before = values.sqrt() if self.values_in == "root" else torch.ones_like(values)
        state["A"].copy_(before[:, None] * right[: self.r])
        state["B"].copy_(left[:, : self.r] * (values / before))

    def _change(self, Q: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        """diag(b) R diag(a) - I, [r, r]."""
        turn = Q
        if self.orthogonal:
            turn = (
                orthogonal.cayley(orthogonal.skew(Q, self.r), self.terms)
                if self.neumann
                else orthogonal.cayley(-orthogonal.skew(Q, self.r))
            )
        turn = turn if a is None else turn * a
        turn = turn if b is None else b[:, None] * turn
        return turn - torch.eye(self.r, dtype=Q.dtype, device=Q.device)

    def rewrite(
        self, site: Linear, x: Tensor, y: Tensor, A: Tensor, B: Tensor, Q: Tensor,
        a: Tensor | None = None, b: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        x = F.dropout(x.to(A.dtype), self.dropout) if self.dropout else x.to(A.dtype)
        branch = self.scale * F.linear(F.linear(F.linear(x, A), self._change(Q, a, b)), B)
        return y + branch.to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        return self.scale * (state["B"] @ self._change(state["Q"], state.get("a"), state.get("b")) @ state["A"])

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings, _ = super().to_peft(site, state)
        start = "pissa_init" if self.values_in == "root" else "psoft_init"
        tensors = {theirs: state[ours] for theirs, ours in NAMES.items() if ours in state}
        return settings | {"ab_svd_init": start, "psoft_svd": "full"}, tensors

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """A and B are the base's, decomposed as HF PEFT does when it loads; not by chance (psoft_svd=lowrank)."""
        if not tensors.keys() <= NAMES.keys() or config.get("psoft_svd", "full") != "full":
            return None
        values = {ours: config[theirs] for theirs, ours in cls.peft_values.items() if theirs in config}
        if not values.get("orthogonal", True):
            values.pop("neumann", None)
        if not values.get("neumann"):
            values.pop("terms", None)
        values["values_in"] = "root" if config.get("ab_svd_init") == "pissa_init" else "B"
        return values, {NAMES[theirs]: tensor for theirs, tensor in tensors.items()}
