"""Hadamard high-rank adaptation."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod


@method
class HiRA(WeightMethod):
    """Every weight is multiplied by an entry of 1 + B A: the change is of as high a rank as the weight itself."""

    name = "hira"
    formula = "y = W x + (W * (B A)) x"
    paper = "Huang et al. 2025, ICLR, openreview.net/forum?id=TwJrTz9cRS"
    peft_type = "HIRA"
    peft_tensors: ClassVar = {"hira_A": "A", "hira_B": "B"}
    peft_values: ClassVar = {"r": "r", "hira_dropout": "dropout"}
    peft_patterns: ClassVar = {"r": "rank_pattern"}

    r: int = param(32, "rank of the product", min=1, alias="rank")
    dropout: float = param(0.0, "dropout on the branch's x, in training", min=0, max=0.99)

    def claims_weight(self) -> str | None:
        return "it multiplies all of the weight"

    def state(self, site: Linear) -> dict[str, State]:
        start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
        return {"A": State((self.r, site.n_in), start), "B": State((site.n_out, self.r))}

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        x = F.dropout(x.to(A.dtype), self.dropout) if self.dropout else x.to(A.dtype)
        branch: Tensor = F.linear(x, weight * (B @ A))
        return y + branch.to(y.dtype)

    def fold(
        self, site: Linear, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        return (weight * (1 + state["B"] @ state["A"])).to(weight.dtype), bias
