"""Decoupled low-rank adaptation."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import PLAIN, Here, State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod

SMALLEST = 1e-4  # length of a row or a column that is divided by


@method
class DeLoRA(WeightMethod):
    """A LoRA whose r components have the length 1 each, times one trained length: angle and strength learn apart.

    The columns of the change are as long as those of the frozen weight were at the start, w.
    """

    name = "delora"
    formula = "y = W x + (l/r) B diag(1 / |b_i| |a_i|) A (w * x), w_j = |W[:, j]|"
    paper = "Bini et al. 2025, arXiv:2503.18225"
    peft_type = "DELORA"
    peft_bias = "delora_only"
    peft_tensors: ClassVar = {"delora_A": "A", "delora_B": "B", "delora_lambda": "length", "delora_w_norm": "w"}
    peft_values: ClassVar = {"r": "r", "delora_lambda": "strength", "module_dropout": "dropout"}
    peft_patterns: ClassVar = {"r": "rank_pattern", "delora_lambda": "lambda_pattern"}
    peft_transposed = False

    r: int = param(8, "components", min=1, alias="rank")
    strength: float = param(15.0, "the length that is trained, at the start", above=0, alias="delora_lambda")
    dropout: float = param(0.0, "dropout on x, in training", min=0, max=0.99)

    def state(self, site: Linear) -> dict[str, State]:
        start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
        return {
            "A": State((self.r, site.n_in), start),
            "B": State((site.n_out, self.r)),
            "length": State((1,), partial(torch.nn.init.constant_, val=self.strength)),
            "w": State((site.n_in,), torch.nn.init.ones_, trainable=False),
        }

    def initialise(self, site: Linear, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> None:
        state["w"].copy_(weight.to(state["w"].dtype).norm(dim=0))

    def _lengths(self, A: Tensor, B: Tensor, length: Tensor) -> Tensor:
        """Of the components, [r]."""
        lengths: Tensor = length / self.r / (A.norm(dim=1).clamp_min(SMALLEST) * B.norm(dim=0).clamp_min(SMALLEST))
        return lengths

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, A: Tensor, B: Tensor, length: Tensor, w: Tensor) -> Tensor:
        x = F.dropout(x.to(A.dtype), self.dropout) if self.dropout else x.to(A.dtype)
        branch: Tensor = F.linear(F.linear(x * w, A) * self._lengths(A, B, length), B)
        return y + branch.to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        a, b = state["A"], state["B"]
        return (b * self._lengths(a, b, state["length"])) @ a * state["w"]
