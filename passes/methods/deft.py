"""Decompositional efficient finetuning."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import PLAIN, Here, State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod


@method
class DEFT(WeightMethod):
    """A trained subspace of the outputs is taken out of the weight, and what stands there instead is trained.

    The subspace is spanned by P [n_out, r], by its QR factor Q, or by P itself against relu(P), which is no orthogonal
    projection. R starts as what is taken out. With para=true nothing stands there instead (PaRa): starts changed.
    """

    name = "deft"
    formula = "y = (I - Q S') W x + s Q R x, Q = P and S = relu(P), or Q = S = qr(P)"
    paper = "Kumar et al. 2025, arXiv:2509.22793; Chen et al. 2024 (PaRa), arXiv:2406.05641"
    peft_type = "DEFT"
    peft_bias = "deft_only"
    peft_values: ClassVar = {
        "r": "r", "decomposition_method": "decomposition", "alpha": "alpha", "para": "para", "deft_dropout": "dropout",
    }  # fmt: skip
    peft_settings = ("init_scale",)  # of a start

    r: int = param(8, "dimensions of the subspace", min=1, alias="rank")
    decomposition: str = param("relu", "how P spans it", choices=("relu", "qr"), alias="decomposition_method")
    alpha: float | None = param(None, "R is scaled by alpha/r; else by 1", above=0)
    para: bool = param(False, "only take out")
    dropout: float = param(0.0, "dropout on R's x, in training", min=0, max=0.99)

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.identity = not self.para
        self.indivisible = None if self.para else "its R starts as what its own P takes out"

    @property
    def scale(self) -> float:
        """The factor of R."""
        return self.alpha / self.r if self.alpha else 1.0

    def claims_weight(self) -> str | None:
        return "it takes a part out of all that the weight is"

    def refuses(self, site: Linear) -> str | None:
        return f"r={self.r} is more than its {site.n_out} outputs" if self.r > site.n_out else None

    def state(self, site: Linear) -> dict[str, State]:
        state = {"P": State((site.n_out, self.r), partial(torch.nn.init.normal_, std=0.02))}
        return state if self.para else state | {"R": State((self.r, site.n_in))}

    def initialise(self, site: Linear, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> None:
        if not self.para:
            _, against = self._spanned(state["P"])
            state["R"].copy_(against.t() @ weight.to(against.dtype) / self.scale)

    def _spanned(self, P: Tensor) -> tuple[Tensor, Tensor]:
        """Q and S, [n_out, r] both."""
        if self.decomposition == "relu":
            return P, F.relu(P)
        q = torch.linalg.qr(P).Q
        return q, q

    def rewrite(
        self, site: Linear, x: Tensor, y: Tensor, bias: Tensor | None, P: Tensor, R: Tensor | None = None
    ) -> Tensor:
        q, against = self._spanned(P)
        inner = -((y if bias is None else y - bias).to(P.dtype) @ against)
        if R is not None:
            x = F.dropout(x.to(R.dtype), self.dropout) if self.dropout else x.to(R.dtype)
            inner = inner + self.scale * F.linear(x, R)
        return y + F.linear(inner, q).to(y.dtype)

    def fold(
        self, site: Linear, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        q, against = self._spanned(state["P"])
        wide = weight.to(q.dtype)
        inner = -against.t() @ wide + (0 if self.para else self.scale * state["R"])
        return (wide + q @ inner).to(weight.dtype), bias

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings, _ = super().to_peft(site, state)
        return settings, {f"deft_{name}": tensor for name, tensor in state.items()}

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if set(tensors) != ({"deft_P"} if config.get("para") else {"deft_P", "deft_R"}):
            return None
        values = {ours: config[theirs] for theirs, ours in cls.peft_values.items() if theirs in config}
        return values, {name.removeprefix("deft_"): tensor for name, tensor in tensors.items()}
