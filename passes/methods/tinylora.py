"""Low-rank adaptation with a handful of numbers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import PLAIN, Here, State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod


@method
class TinyLoRA(WeightMethod):
    """The weight's leading singular directions, mixed by a matrix that is a sum of frozen random ones: u numbers learn.

    A [r, n_in] and B [n_out, r] share the singular values, and P [u, r, r] is drawn once; all of them are frozen.
    """

    name = "tinylora"
    formula = "y = W x + B (sum_i v_i P_i) A x, B A = svd_r(W)"
    paper = "Morris et al. 2026, arXiv:2602.04118"
    peft_type = "TINYLORA"
    peft_bias = "tinylora_only"
    peft_tensors: ClassVar = {"tinylora_A": "A", "tinylora_B": "B", "tinylora_P": "P", "tinylora_v": "v"}
    peft_numbered = ("tinylora_v",)
    peft_values: ClassVar = {"r": "r", "u": "u", "tinylora_dropout": "dropout"}
    peft_settings = ("projection_seed", "save_projection", "init_v_bound")  # of the start, which the folder has

    r: int = param(2, "singular directions, or all where there are fewer", min=1, alias="rank")
    u: int = param(64, "numbers that learn at each weight", min=1)
    dropout: float = param(0.0, "dropout on x, in training", min=0, max=0.99)

    def _rank(self, site: Linear) -> int:
        return min(self.r, site.n_in, site.n_out)

    def state(self, site: Linear) -> dict[str, State]:
        r = self._rank(site)
        drawn = partial(torch.nn.init.normal_, std=1 / math.sqrt(r))
        return {
            "v": State((self.u,)),
            "P": State((self.u, r, r), drawn, trainable=False),
            "A": State((r, site.n_in), trainable=False),
            "B": State((site.n_out, r), trainable=False),
        }

    def initialise(self, site: Linear, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> None:
        left, singular, right = torch.linalg.svd(weight.float(), full_matrices=False)
        r = self._rank(site)
        root = singular[:r].sqrt()
        state["A"].copy_(root[:, None] * right[:r])
        state["B"].copy_(left[:, :r] * root)

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, A: Tensor, B: Tensor, P: Tensor, v: Tensor) -> Tensor:
        x = F.dropout(x.to(A.dtype), self.dropout) if self.dropout else x.to(A.dtype)
        branch: Tensor = F.linear(F.linear(F.linear(x, A), torch.einsum("i,ijk->jk", v, P)), B)
        return y + branch.to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        return state["B"] @ torch.einsum("i,ijk->jk", state["v"], state["P"]) @ state["A"]

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings, tensors = super().to_peft(site, state)
        return settings | {"save_projection": True, "weight_tying": 0.0}, tensors
