"""A learned gate over what another method adds."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from peftc.protocol import F, Tensor, torch
from peftc.protocol.combinator import INNER, Combinator
from peftc.protocol.method import REQUIRED, Method, Stage, State, method, param
from peftc.protocol.site import Attention, Projection, Sublayer


@method
class Gated(Combinator):
    """How much of a method's change is let through, decided at every position by what enters there.

    UniPELT's authors average the gate over the positions of a sequence. In a causal model that would show each token
    the ones behind it, so here every position has its own, as the paper's formula has it. They scale a prefix itself;
    here the gate stands at its effect, between the attention without it and with it.
    """

    name = "gated"
    formula = "y + sigmoid(w x + b) (f(y) - y), f the method"
    paper = "Mao et al. 2021 (UniPELT), arXiv:2110.07577"

    unmergeable = "its gate depends on what enters the layer"

    method: Method = param(REQUIRED, "what is gated")

    outermost = True

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.unmergeable = type(self).unmergeable
        self.data = self.method.data

    def conflict(self) -> str | None:
        if isinstance(self.method, Gated):
            return "a gate of a gate is a gate"
        if self.method.stage is Stage.ATTENTION and self.method.attends_apart:
            return f"{self.method.name} has a gate of its own"
        return super().conflict()

    def refuses(self, site: Any) -> str | None:
        if self.method.rewrites_input(site):
            return f"{self.method.name} changes the input here, and a gate needs an output"
        if not isinstance(site, Projection | Sublayer) or not getattr(site, "features_last", True):
            return f"a gate reads what enters a linear layer or a sublayer, and this is {site.noun}"
        return super().refuses(site)

    def state(self, site: Any) -> dict[str, State]:
        start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
        entering = site.n_in if isinstance(site, Projection) else site.entry_width
        return super().state(site) | {"w": State((1, entering), start), "b": State((1,))}

    def calibrate(self, site: Any, weight: Tensor, data: Any, state: dict[str, Tensor]) -> None:
        inner = {name.removeprefix(INNER): tensor for name, tensor in state.items() if name.startswith(INNER)}
        self.method.calibrate(site, weight, data, inner)

    def probe(self) -> Method:
        return self.method.probe()

    def takes_positions(self, site: Any) -> int:
        """None: where the gate is closed, the model counts its tokens as the base does."""
        return 0

    def rewrite(self, site: Any, x: Tensor, y: Tensor, **known: Tensor) -> Tensor:
        return self.gate(site, x, y, self.inner_output(site, x, y, known), known["w"], known["b"])

    def gate(self, site: Any, x: Tensor, y: Tensor, changed: Tensor, w: Tensor, b: Tensor) -> Tensor:
        gate = torch.sigmoid(F.linear(x.to(w.dtype), w, b))
        inside = self.method.stage is Stage.ATTENTION  # and not on the output of the sublayer around one
        beside = _beside_heads(gate, y, site) if inside else gate.reshape(*y.shape[:-1], 1)
        return y + (beside * (changed - y)).to(y.dtype)


def _beside_heads(gate: Tensor, y: Tensor, site: Attention) -> Tensor:
    """A number a token, [..., 1], beside an attention's result, [batch, heads, tokens, width] or heads in the batch."""
    tokens = gate.reshape(-1, 1, y.shape[-2], 1)
    return tokens if y.dim() == 4 else tokens.expand(-1, len(site.groups), -1, -1).flatten(0, 1)
