"""Bias-efficient finetuning."""

from __future__ import annotations

from typing import ClassVar

from peftc.protocol import Tensor
from peftc.protocol.method import State, method
from peftc.protocol.site import Linear
from peftc.protocol.stages import OutputMethod


@method
class BEFT(OutputMethod):
    """A trained vector is added to the outputs, whether or not the layer has a bias: that of values does most."""

    name = "beft"
    formula = "y = W x + b + c"
    paper = "Huang et al. 2025, arXiv:2509.15974"
    peft_type = "BEFT"
    peft_transposed = False
    peft_tensors: ClassVar = {"beft_bias": "c"}

    def state(self, site: Linear) -> dict[str, State]:
        return {"c": State((1, site.n_out))}

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, c: Tensor) -> Tensor:
        return y + c[0].to(y.dtype)

    def adds_bias(self, site: Linear) -> bool:
        return True

    def fold(
        self, site: Linear, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        c = state["c"][0]
        return weight, c.to(weight.dtype) if bias is None else (bias + c).to(bias.dtype)
