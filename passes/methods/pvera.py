"""Probabilistic vector-based random matrix adaptation."""

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
class PVeRA(WeightMethod):
    """VeRA whose inner features are drawn in training: A [2 r, n_in] gives the mean and the log-variance of each.

    Afterwards the mean is taken. A and B are frozen, the same for all layers, and drawn from `seed`.
    """

    name = "pvera"
    formula = "y = W x + b * B z, z ~ N(m, exp(v)), [m, v] = d * A x; z = m when not training"
    paper = "Fillioux et al. 2025, arXiv:2512.07703"
    peft_type = "PVERA"
    peft_bias = "pvera_only"
    peft_tensors: ClassVar = {"pvera_lambda_b": "lambda_b", "pvera_lambda_d": "lambda_d"}
    peft_shared: ClassVar = {"pvera_A": "A", "pvera_B": "B"}
    peft_values: ClassVar = {
        "r": "r", "d_initial": "d_initial", "projection_prng_key": "seed", "pvera_dropout": "dropout",
    }  # fmt: skip
    peft_settings = ("save_projection", "generator_seed")  # of the second, that of its noise

    r: int = param(256, "inner features", min=1, alias="rank")
    d_initial: float = param(0.1, "what the vector d starts from; b starts from zero")
    seed: int = param(0, "seed of A and B", min=0, alias="projection_prng_key")
    dropout: float = param(0.0, "dropout on x, in training", min=0, max=0.99, alias="pvera_dropout")

    def shared(self, sites: Sequence[Linear]) -> dict[str, State]:
        a = 2 * self.r, max(site.n_in for site in sites)
        b = max(site.n_out for site in sites), self.r
        return {
            "A": State(a, partial(draws.kaiming_uniform, seed=self.seed), trainable=False),
            "B": State(b, partial(draws.kaiming_uniform, seed=self.seed, behind=math.prod(a)), trainable=False),
        }

    def state(self, site: Linear) -> dict[str, State]:
        start = partial(torch.nn.init.constant_, val=self.d_initial)
        return {"lambda_b": State((site.n_out,)), "lambda_d": State((2 * self.r,), start)}

    def rewrite(
        self, site: Linear, x: Tensor, y: Tensor, A: Tensor, B: Tensor, lambda_b: Tensor, lambda_d: Tensor,
        training: Tensor,
    ) -> Tensor:  # fmt: skip
        x = F.dropout(x.to(A.dtype), self.dropout) if self.dropout else x.to(A.dtype)
        mean, variance = (lambda_d * F.linear(x, A[:, : site.n_in])).chunk(2, -1)
        drawn = mean + training.to(mean.dtype) * torch.randn_like(mean) * torch.exp(variance / 2)
        branch: Tensor = lambda_b * F.linear(drawn, B[: site.n_out])
        return y + branch.to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        into = state["lambda_d"][: self.r, None] * state["A"][: self.r, : site.n_in]
        return state["lambda_b"][:, None] * state["B"][: site.n_out] @ into

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings, tensors = super().to_peft(site, state)
        return settings | {"save_projection": True}, tensors
