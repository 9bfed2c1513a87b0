"""Full-rank random matrix adaptation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod


@method
class RandLoRA(WeightMethod):
    """A sum of frozen random products of rank r, as many as make it of full rank, each scaled by two trained vectors.

    A [r, smallest side] and B [largest side, bases, r] are common to all layers and drawn from `seed`. All bases share
    A, which the vectors scale; where a layer has more inputs than outputs, the products stand transposed.
    """

    name = "randlora"
    formula = "y = W x + (alpha/r) sum_j B_j diag(l_j) A diag(g_j) x"
    paper = "Albert et al. 2025, arXiv:2502.00987"
    peft_type = "RANDLORA"
    peft_bias = "randlora_only"
    peft_tensors: ClassVar = {"randlora_lambda": "lambdas", "randlora_gamma": "gammas"}
    peft_shared: ClassVar = {"randlora_A": "A", "randlora_B": "B"}
    peft_values: ClassVar = {
        "r": "r", "randlora_alpha": "alpha", "projection_prng_key": "seed", "randlora_dropout": "dropout",
    }  # fmt: skip
    peft_settings = ("save_projection",)

    r: int = param(32, "rank of each basis", min=1, alias="rank")
    alpha: float = param(640.0, "the branch is scaled by alpha/r", above=0, alias="randlora_alpha")
    seed: int = param(0, "seed of A and B", min=0, alias="projection_prng_key")
    dropout: float = param(0.0, "dropout on x, in training", min=0, max=0.99)

    def bases(self, site: Linear) -> int:
        """How many of them make up the smaller side."""
        return -(-min(site.n_in, site.n_out) // self.r)

    def shared(self, sites: Sequence[Linear]) -> dict[str, State]:
        sides = max(site.n_in for site in sites), max(site.n_out for site in sites)
        a = self.r, 1, min(sides)
        b = max(sides), -(-min(sides) // self.r), self.r
        drawn = partial(_drawn, seed=self.seed, first=a, then=b)
        return {"A": State(a, partial(drawn, which=0), False), "B": State(b, partial(drawn, which=1), False)}

    def state(self, site: Linear) -> dict[str, State]:
        bases, small = self.bases(site), min(site.n_in, site.n_out)
        start = partial(torch.nn.init.constant_, val=1 / max(bases, small))
        return {"lambdas": State((self.r, bases)), "gammas": State((bases, small), start)}

    def _factors(self, site: Linear, **state: Tensor) -> tuple[Tensor, Tensor]:
        """What reads x, [r bases, n_in], and what writes y, [n_out, r bases]."""
        bases, small = self.bases(site), min(site.n_in, site.n_out)
        a = state["lambdas"][..., None] * state["A"][..., :small] * state["gammas"]
        narrow = a.flatten(0, 1)
        wide = state["B"][: max(site.n_in, site.n_out), :bases].flatten(1)
        return (narrow, wide) if small == site.n_in else (wide.t(), narrow.t())

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, **state: Tensor) -> Tensor:
        into, out = self._factors(site, **state)
        x = F.dropout(x.to(into.dtype), self.dropout) if self.dropout else x.to(into.dtype)
        branch: Tensor = self.alpha / self.r * F.linear(F.linear(x, into), out)
        return y + branch.to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        into, out = self._factors(site, **state)
        return self.alpha / self.r * (out @ into)

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings, tensors = super().to_peft(site, state)
        return settings | {"save_projection": True}, tensors


def _drawn(tensor: Tensor, *, seed: int, first: tuple[int, ...], then: tuple[int, ...], which: int) -> Tensor:
    """A, or the bases that follow it, uniform and of deviation 1, as HF PEFT draws them."""
    generator = torch.Generator().manual_seed(seed)
    start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5), generator=generator)
    made = start(torch.empty(first))
    if which:
        made = torch.cat([start(torch.empty(then[0], 1, then[2])) for _ in range(then[1])], 1)
    return tensor.copy_(made / made.std() if made.numel() > 1 else made)
