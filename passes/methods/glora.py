"""Generalized low-rank adaptation."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod

PARTS = {"Xd": "_down", "Xu": "_up", "X": ""}  # their names of the tensors of a path -> how ours end


@method
class GLoRA(WeightMethod):
    """The weight and the bias are each scaled and shifted, and the bias by the weight, too; where there is one.

    A and B [n_out, n_in], C [n_in], D and E [n_out] are each kept as one of several shapes, down to nothing.
    """

    name = "glora"
    formula = "y = (W + W * A + B) x + b + D * b + E + W C"
    paper = "Chavan et al. 2023, arXiv:2306.07967"
    peft_type = "GLORA"
    peft_bias = "glora_only"
    peft_values: ClassVar = {"r": "r", "config_A_B": "weight_by", "config_C": "across_by", "config_D_E": "bias_by"}
    peft_transposed = False

    r: int = param(8, "rank of those that are products", min=1, alias="rank")
    weight_by: str = param("lora", "how A and B are kept", choices=("lora", "vector", "constant", "none"))
    across_by: str = param("lora", "how C is kept", choices=("lora", "vector", "none"))
    bias_by: str = param("constant", "how D and E are kept", choices=("constant", "vector", "none"))

    def conflict(self) -> str | None:
        kinds = {self.weight_by, self.across_by, self.bias_by}
        return "nothing is left to learn" if kinds == {"none"} else None

    def refuses(self, site: Linear) -> str | None:
        nothing = self.weight_by == "none" and site.bias is None
        return "it has no bias, and weight_by=none leaves nothing else to learn" if nothing else None

    def claims_weight(self) -> str | None:
        return "it multiplies all of the weight"

    def state(self, site: Linear) -> dict[str, State]:
        kinds = {"A": self.weight_by, "B": self.weight_by}
        if site.bias is not None:
            kinds |= {"C": self.across_by, "D": self.bias_by, "E": self.bias_by}
        state: dict[str, State] = {}
        for name, kind in kinds.items():
            rows, columns = (site.n_in, 1) if name == "C" else (site.n_out, site.n_in)
            if kind == "lora":
                start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
                state |= {f"{name}_down": State((rows, self.r)), f"{name}_up": State((self.r, columns), start)}
            elif kind != "none":
                vector = (rows,) if name in "DE" else (rows, 1)
                state[name] = State((1,) if kind == "constant" else vector)
        return state

    def _whole(self, name: str, state: dict[str, Tensor]) -> Tensor | None:
        if f"{name}_up" in state:
            return state[f"{name}_down"] @ state[f"{name}_up"]
        return state.get(name)

    def _changes(
        self, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """What is added to the weight, and to the bias."""
        a, b, c, d, e = (self._whole(name, state) for name in "ABCDE")
        wide = weight if a is None and c is None else weight.to(next(iter(state.values())).dtype)
        matrix = None if a is None or b is None else (wide * a + b)
        if bias is None:
            return matrix, None
        parts = [None if d is None else bias * d, e, None if c is None else (wide @ c)[:, 0]]
        there = [part.expand_as(bias) for part in parts if part is not None]
        return matrix, torch.stack(there).sum(0) if there else None

    def rewrite(
        self, site: Linear, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, **state: Tensor
    ) -> Tensor:
        matrix, shift = self._changes(weight, bias, state)
        if matrix is not None:
            y = y + F.linear(x.to(matrix.dtype), matrix).to(y.dtype)
        return y if shift is None else y + shift.to(y.dtype)

    def fold(
        self, site: Linear, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        matrix, shift = self._changes(weight, bias, state)
        weight = weight if matrix is None else (weight.to(matrix.dtype) + matrix).to(weight.dtype)
        return weight, bias if bias is None or shift is None else (bias + shift).to(bias.dtype)

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings, _ = super().to_peft(site, state)
        tensors: dict[str, Tensor] = {}
        shapes = {"A": (site.n_out, site.n_in), "B": (site.n_out, site.n_in), "C": (site.n_in, 1),
                  "D": (site.n_out,), "E": (site.n_out,)}  # fmt: skip
        for name, shape in shapes.items():
            found = {theirs: state[name + ours] for theirs, ours in PARTS.items() if name + ours in state}
            found = found or {"zeros": torch.zeros(shape)}
            tensors |= {f"glora_{name}.{theirs}": tensor for theirs, tensor in found.items()}
        return settings, tensors

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        state: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name, _, part = key.removeprefix("glora_").partition(".")
            if part in PARTS:
                state[name + PARTS[part]] = tensor
            elif part != "zeros" or tensor.any():
                return None
        return {ours: config[theirs] for theirs, ours in cls.peft_values.items() if theirs in config}, state
