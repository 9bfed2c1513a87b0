"""Vector-based random matrix adaptation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from peftc.protocol import F, Lazy, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod

if TYPE_CHECKING:
    from peftc.kernels.common import draws
else:
    draws = Lazy("peftc.kernels.common.draws")


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
    peft_bias = "vera_only"
    peft_tensors: ClassVar = {"vera_lambda_b": "lambda_b", "vera_lambda_d": "lambda_d"}
    peft_values: ClassVar = {
        "r": "r", "d_initial": "d_initial", "projection_prng_key": "seed", "vera_dropout": "dropout",
    }  # fmt: skip
    peft_settings = ("save_projection",)
    peft_shared: ClassVar = {"vera_A": "A", "vera_B": "B"}

    r: int = param(256, "rows of A and columns of B", min=1, alias="rank")
    d_initial: float = param(0.1, "what the vector d starts from; b starts from zero")
    seed: int = param(0, "seed of A and B", min=0, alias="projection_prng_key")
    dropout: float = param(0.0, "dropout on x, in training", min=0, max=0.99, alias="vera_dropout")

    def shared(self, sites: Sequence[Linear]) -> dict[str, State]:
        a = self.r, max(site.n_in for site in sites)
        b = max(site.n_out for site in sites), self.r
        return {
            "A": State(a, partial(draws.kaiming_uniform, seed=self.seed), trainable=False),
            "B": State(b, partial(draws.kaiming_uniform, seed=self.seed, behind=math.prod(a)), trainable=False),
        }

    def state(self, site: Linear) -> dict[str, State]:
        start = partial(torch.nn.init.constant_, val=self.d_initial)
        return {"lambda_b": State((site.n_out,)), "lambda_d": State((self.r,), start)}

    def rewrite(
        self, site: Linear, x: Tensor, y: Tensor, A: Tensor, B: Tensor, lambda_b: Tensor, lambda_d: Tensor
    ) -> Tensor:
        x = F.dropout(x.to(A.dtype), self.dropout) if self.dropout else x.to(A.dtype)
        inner = lambda_d * F.linear(x, A[:, : site.n_in])
        branch: Tensor = lambda_b * F.linear(inner, B[: site.n_out])
        return y + branch.to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        into = state["lambda_d"][:, None] * state["A"][:, : site.n_in]
        return state["lambda_b"][:, None] * state["B"][: site.n_out] @ into

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings, tensors = super().to_peft(site, state)
        return settings | {"save_projection": True, "bias": "none"}, tensors
