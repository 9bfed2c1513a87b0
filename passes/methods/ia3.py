"""Infused adapter by inhibiting and amplifying inner activations."""

from __future__ import annotations

from typing import Any

from peftc.protocol import Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import OutputMethod


@method
class IA3(OutputMethod):
    """One trained vector that scales keys, values, and what enters the feed-forward's down projection."""

    name = "ia3"
    formula = "y = l * (W x + b), or y = W (l * x) + b at mlp.down"
    paper = "Liu et al. 2022, arXiv:2205.05638"
    peft_type = "IA3"
    peft_settings = ("feedforward_modules",)  # whether a module is one of them, once the folder is read

    on: str = param(
        "auto",
        "what is changed; auto: the input of mlp.down, the output elsewhere",
        choices=("auto", "input", "output"),
    )
    mode: str = param("multiply", "multiply by l (from 1) or add l (from 0)", choices=("multiply", "add"))

    def _at_input(self, site: Linear) -> bool:
        return self.on == "input" or (self.on == "auto" and "mlp.down" in site.roles)

    def refuses(self, site: Linear) -> str | None:
        if self._at_input(site) and site.rows is not None:
            return "its input is also that of the weight's other rows: use on=output"
        return None

    def state(self, site: Linear) -> dict[str, State]:
        start = torch.nn.init.ones_ if self.mode == "multiply" else torch.nn.init.zeros_
        return {"l": State((site.n_in if self._at_input(site) else site.n_out,), start)}

    def rewrites_input(self, site: Linear) -> bool:
        return self._at_input(site)

    def _apply(self, value: Tensor, l: Tensor) -> Tensor:  # noqa: E741 - the paper's name
        l = l.to(value.dtype)  # noqa: E741
        return value * l if self.mode == "multiply" else value + l

    def rewrite_input(self, site: Linear, x: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        return self._apply(x, l)

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        return self._apply(y, l)

    def unexportable(self, site: Linear) -> str | None:
        return f"it has no {self!r}" if self.mode == "add" else None

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        entering = self._at_input(site)
        settings = {"peft_type": "IA3", "feedforward_modules": [site.name] if entering else []}
        return settings, {"ia3_l": state["l"].reshape((1, -1) if entering else (-1, 1))}

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        entering = bool(config["feedforward_modules"])
        if set(tensors) != {"ia3_l"} or tensors["ia3_l"].dim() != 2 or tensors["ia3_l"].shape[not entering] != 1:
            return None
        return {"on": "input" if entering else "output"}, {"l": tensors["ia3_l"].flatten()}

    def adds_bias(self, site: Linear) -> bool:
        return self.mode == "add"

    def fold(
        self, site: Linear, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        l = state["l"].to(weight.dtype)  # noqa: E741
        if self.mode == "multiply":
            if self._at_input(site):
                return weight * l, bias
            return weight * l[:, None], None if bias is None else bias * l
        shift = weight @ l if self._at_input(site) else l
        return weight, shift if bias is None else bias + shift
