"""High-rank training by many low-rank updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import PLAIN, Here, State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod

if TYPE_CHECKING:
    from peftc.protocol.method import Place, Step


def _start(tensor: Tensor) -> Tensor:
    """As `torch.nn.Linear` starts its weight."""
    return torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


@method
class ReLoRA(WeightMethod):
    """LoRA that is merged into the weight every so often and starts anew, so that the sum of its updates has any rank.

    After each merge A and B start again, what the optimiser remembers of them is dropped, and the learning rate rises
    from zero again. What was merged is kept beside the base model's weight, as `merged`, and saved.
    """

    name = "relora"
    formula = "y = (W + M) x + (alpha/r) B A x; every T steps M grows by (alpha/r) B A, and A, B start anew"
    paper = "Lialin et al. 2023, arXiv:2307.05695"
    scheduled = True

    r: int = param(8, "rank of the product", min=1, alias="rank")
    alpha: float = param(16.0, "the branch is scaled by alpha/r", above=0)
    dropout: float = param(0.0, "dropout on x, in training", min=0, max=0.99)
    every: int = param(1000, "steps from one merge to the next", min=1)
    warmup: int = param(50, "steps in which the learning rate rises again after a merge", min=0)

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / self.r

    def refuses(self, site: Linear) -> str | None:
        return "it changes the frozen weight, and this one is tied to another layer's" if site.tied else None

    def claims_weight(self) -> str | None:
        return "it adds to the weight in training"

    def state(self, site: Linear) -> dict[str, State]:
        return {
            "A": State((self.r, site.n_in), _start),
            "B": State((site.n_out, self.r)),
            "merged": State((site.n_out, site.n_in), trainable=False),
        }

    def prepare(self, site: Linear, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> Tensor:
        merged = state["merged"]
        return weight + merged.to(weight.dtype) if merged.any() else weight

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, A: Tensor, B: Tensor) -> Tensor:
        x = F.dropout(x.to(A.dtype), self.dropout) if self.dropout else x.to(A.dtype)
        branch: Tensor = self.scale * F.linear(F.linear(x, A), B)
        return y + branch.to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        return self.scale * (state["B"] @ state["A"])

    def warmth(self, step: int) -> float:
        since = (step - 1) % self.every + 1
        return min(1.0, since / (self.warmup + 1)) if step > self.every else 1.0

    def on_step(self, step: Step, places: Sequence[Place]) -> bool:
        if step.number % self.every:
            return False
        for place in places:
            state = place.state
            state["merged"] += self.delta(place.site, **state)  # type: ignore[arg-type]
            _start(state["A"])
            state["B"].zero_()
            step.forget(state["A"])
            step.forget(state["B"])
        return True
