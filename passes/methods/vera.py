"""Vector-based random matrix adaptation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from peftc.protocol.method import State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod


@method
class VeRA(WeightMethod):
    """Two trained vectors that scale what frozen random matrices, the same ones for all layers, do beside the weight.

    A [r, largest n_in] and B [largest n_out, r] are drawn once a statement, from `seed` alone; a layer reads the first
    n_in columns and n_out rows.
    """

    name = "vera"
    formula = "y = W x + b * B (d * A x)"
    paper = "Kopiczko et al. 2023, arXiv:2310.11454"
    peft_type = "VERA"
    peft_settings = ("r", "d_initial", "projection_prng_key", "vera_dropout", "save_projection")
    peft_shared: ClassVar = {"vera_A": "A", "vera_B": "B"}

    r: int = param(256, "rows of A and columns of B", min=1, alias="rank")
    d_initial: float = param(0.1, "what the vector d starts from; b starts from zero")
    seed: int = param(0, "seed of A and B", min=0, alias="projection_prng_key")
    dropout: float = param(0.0, "dropout on x, in training", min=0, max=0.99, alias="vera_dropout")

    def shared(self, sites: Sequence[Linear]) -> dict[str, State]:
        a = self.r, max(site.n_in for site in sites)
        b = max(site.n_out for site in sites), self.r
        return {
            "A": State(a, partial(_drawn, seed=self.seed), trainable=False),
            "B": State(b, partial(_drawn, seed=self.seed, behind=math.prod(a)), trainable=False),
        }

    def state(self, site: Linear) -> dict[str, State]:
        start = partial(torch.nn.init.constant_, val=self.d_initial)
        return {"lambda_b": State((site.n_out,)), "lambda_d": State((self.r,), start)}

    def rewrite(
        self, site: Linear, x: Tensor, y: Tensor, A: Tensor, B: Tensor, lambda_b: Tensor, lambda_d: Tensor
    ) -> Tensor:
        x = dropout(x.to(A.dtype), self.dropout) if self.dropout else x.to(A.dtype)
        inner = lambda_d * linear(x, A[:, : site.n_in])
        branch: Tensor = lambda_b * linear(inner, B[: site.n_out])
        return y + branch.to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        into = state["lambda_d"][:, None] * state["A"][:, : site.n_in]
        return state["lambda_b"][:, None] * state["B"][: site.n_out] @ into

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings = {"peft_type": "VERA", "r": self.r, "d_initial": self.d_initial, "projection_prng_key": self.seed,
                    "vera_dropout": self.dropout, "save_projection": True, "bias": "none"}  # fmt: skip
        return settings, {f"vera_{name}": state[name] for name in ("lambda_b", "lambda_d")}

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if set(tensors) != {"vera_lambda_b", "vera_lambda_d"}:
            return None
        values = {
            "r": config.get("r", 256),
            "d_initial": config.get("d_initial", 0.1),
            "seed": config.get("projection_prng_key", 0),
            "dropout": config.get("vera_dropout", 0.0),
        }
        return values, {name.removeprefix("vera_"): tensor for name, tensor in tensors.items()}


def _drawn(tensor: Tensor, *, seed: int, behind: int = 0) -> Tensor:
    """Kaiming-uniform numbers: those that follow the first `behind` ones of the seed, on any device, as in HF PEFT."""
    generator = torch.Generator().manual_seed(seed)
    bound = math.sqrt(6 / tensor.shape[1])
    torch.empty(behind).uniform_(generator=generator)
    return tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))
