"""Weight-aware neural tweakers."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from peftc.protocol import F, Lazy, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod

if TYPE_CHECKING:
    from peftc.kernels.common import activations
else:
    activations = Lazy("peftc.kernels.common.activations")


@method
class PEANuT(WeightMethod):
    """The change of the weight is what a small network makes of the weight itself, column by column.

    Between A [r, n_out] and B [n_out, r] there may be `depth` layers in, and as many out with residuals across.
    """

    name = "peanut"
    formula = "y = W x + s (B g(f(A W))) x, f the activation, g the layers between"
    paper = "Zhong et al. 2024, arXiv:2410.01870"
    peft_type = "PEANUT"
    peft_values: ClassVar = {"r": "r", "depth": "depth", "act_fn": "activation", "scaling": "scale"}
    peft_transposed = False

    r: int = param(32, "width of the network", min=1, alias="rank")
    depth: int = param(0, "layers in, and as many out, of r x r", min=0, max=64)
    activation: str = param("relu", "behind each layer but B", choices=("relu", "gelu", "silu", "tanh"), alias="act_fn")
    scale: float = param(1.0, "the factor of the change", above=0, alias="scaling")

    def claims_weight(self) -> str | None:
        return "its change is a function of the weight"

    def state(self, site: Linear) -> dict[str, State]:
        start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
        between = {name: State((self.r, self.r), start) for name in self._between("in") + self._between("out")}
        return {"A": State((self.r, site.n_out), start), **between, "B": State((site.n_out, self.r))}

    def _between(self, way: str) -> list[str]:
        return [f"{way}_{place}" for place in range(self.depth)]

    def _change(self, weight: Tensor, **state: Tensor) -> Tensor:
        """[n_in, n_out], in the precision of the state."""
        found = activations.activate(F.linear(weight.t().to(state["A"].dtype), state["A"]), self.activation)
        across = []
        for name in self._between("in"):
            across.append(found)
            found = activations.activate(F.linear(found, state[name]), self.activation)
        for name in self._between("out"):
            found = activations.activate(F.linear(found, state[name]), self.activation) + across.pop()
        return self.scale * F.linear(found, state["B"])

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, weight: Tensor, **state: Tensor) -> Tensor:
        change = self._change(weight, **state)
        return y + (x.to(change.dtype) @ change).to(y.dtype)

    def fold(
        self, site: Linear, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        change = self._change(weight, **state).t()
        return (weight.to(change.dtype) + change).to(weight.dtype), bias

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings, _ = super().to_peft(site, state)
        return settings, {theirs: state[ours] for theirs, ours in _names(self.depth).items()}

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        names = _names(config.get("depth", 0))
        if set(tensors) != set(names):
            return None
        values = {ours: config[theirs] for theirs, ours in cls.peft_values.items() if theirs in config}
        return values, {ours: tensors[theirs] for theirs, ours in names.items()}


def _names(depth: int) -> dict[str, str]:
    names = {"peanut_A.weight": "A", "peanut_B.weight": "B"}
    for place in range(depth):
        names |= {f"peanut_encoders.{place}.weight": f"in_{place}", f"peanut_decoders.{place}.weight": f"out_{place}"}
    return names
