"""Low-rank adaptation beside a weight without its smallest directions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import PLAIN, Here, State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod


@method
class KaSA(WeightMethod):
    """The weight without its r smallest singular directions, and B diag(s) A in their place, with a trained s.

    Two penalties are added to the loss: beta |s|^2, and gamma (|B^T B - I| + |A A^T - I|).
    """

    name = "kasa"
    formula = "y = W' x + (alpha/r) B diag(s) A x, W' = W - its last r singular directions"
    paper = "Wang et al. 2024, arXiv:2412.06071"
    identity = False
    peft_type = "LORA"
    peft_bias = "lora_only"
    peft_transposed = False
    peft_settings = ("r", "lora_alpha", "lora_dropout", "use_rslora", "kasa_config")
    peft_patterns: ClassVar = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
    peft_tensors: ClassVar = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_diag": "s"}

    r: int = param(8, "rank of the product, and directions that the weight loses", min=1, alias="rank")
    alpha: float = param(16.0, "the branch is scaled by alpha/r", above=0)
    beta: float = param(1e-4, "weight of |s|^2 in the loss", min=0)
    gamma: float = param(1e-3, "weight of what A and B lack to be orthogonal", min=0)
    dropout: float = param(0.0, "dropout on x, in training", min=0, max=0.99)

    def refuses(self, site: Linear) -> str | None:
        if self.r >= min(site.n_in, site.n_out):
            return f"it needs r < {min(site.n_in, site.n_out)}, the smaller side of the weight"
        return "it changes the frozen weight, and this one is tied to another layer's" if site.tied else None

    def claims_weight(self) -> str | None:
        return "it takes the smallest directions out of the weight"

    def state(self, site: Linear) -> dict[str, State]:
        return {
            "A": State((self.r, site.n_in), partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))),
            "B": State((site.n_out, self.r)),
            "s": State((self.r,), torch.nn.init.normal_),
        }

    def prepare(self, site: Linear, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> Tensor:
        wide = weight if weight.dtype is torch.float64 else weight.float()
        left, singular, right = torch.linalg.svd(wide, full_matrices=False)
        kept: Tensor = wide - left[:, -self.r :] * singular[-self.r :] @ right[-self.r :]
        return kept.to(weight.dtype)

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, A: Tensor, B: Tensor, s: Tensor) -> Tensor:
        x = F.dropout(x.to(A.dtype), self.dropout) if self.dropout else x.to(A.dtype)
        branch: Tensor = self.alpha / self.r * F.linear(F.linear(x, A) * s, B)
        return y + branch.to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        return self.alpha / self.r * (state["B"] * state["s"] @ state["A"])

    def penalty(self, site: Linear, state: Mapping[str, Tensor]) -> Tensor:
        a, b, s = state["A"], state["B"], state["s"]
        identity = torch.eye(self.r, dtype=a.dtype, device=a.device)
        off = (b.T @ b - identity).norm() + (a @ a.T - identity).norm()
        penalty: Tensor = self.beta * s.square().sum() + self.gamma * off
        return penalty

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        _, tensors = super().to_peft(site, state)
        return {
            "peft_type": "LORA", "r": self.r, "lora_alpha": self.alpha, "use_rslora": False, "bias": "none",
            "lora_dropout": self.dropout, "kasa_config": {"beta": self.beta, "gamma": self.gamma},
        }, tensors  # fmt: skip

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if config.get("kasa_config") is None or config.get("use_dora") or config.get("lora_bias"):
            return None
        if set(tensors) != set(cls.peft_tensors):
            return None
        r, alpha = config.get("r", 8), config.get("lora_alpha", 8)
        values = {
            "r": r,
            "alpha": alpha * math.sqrt(r) if config.get("use_rslora") else alpha,  # of which the scale is 1/r
            "beta": config["kasa_config"].get("beta", 1e-4),
            "gamma": config["kasa_config"].get("gamma", 1e-3),
            "dropout": config.get("lora_dropout", 0.0),
        }
        return values, {ours: tensors[theirs] for theirs, ours in cls.peft_tensors.items()}
