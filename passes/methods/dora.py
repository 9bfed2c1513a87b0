"""Weight-decomposed low-rank adaptation."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from peftc.protocol import F, Lazy, Tensor, torch
from peftc.protocol.method import PLAIN, Here, State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod

if TYPE_CHECKING:
    from peftc.kernels import row_lengths
else:
    row_lengths = Lazy("peftc.kernels.row_lengths")

# The length of a row of zeros, which is divided by; its square is a normal number of float32.
SMALLEST = 2.0**-63


@method
class DoRA(WeightMethod):
    """LoRA on the direction of every output row, and a trained length for it."""

    name = "dora"
    formula = "y = m * (W + (alpha/r) B A) x / |W + (alpha/r) B A|"
    paper = "Liu et al. 2024, arXiv:2402.09353"
    peft_type = "LORA"
    peft_bias = "lora_only"
    peft_settings = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
    peft_patterns: ClassVar = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}

    r: int = param(8, "rank of the product", min=1, alias="rank")
    alpha: float = param(16.0, "the product is scaled by alpha/r", above=0)
    dropout: float = param(0.0, "dropout on the low-rank branch's x, in training", min=0, max=0.99)

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / self.r

    def claims_weight(self) -> str | None:
        return "its lengths are those of the weight's own rows"

    def state(self, site: Linear) -> dict[str, State]:
        start = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5))
        return {
            "A": State((self.r, site.n_in), start),
            "B": State((site.n_out, self.r)),
            "m": State((site.n_out,), torch.nn.init.ones_),
        }

    def initialise(self, site: Linear, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> None:
        state["m"].copy_(weight.to(state["m"].dtype).norm(dim=1).clamp_min(SMALLEST))

    def rewrite(
        self, site: Linear, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None,
        A: Tensor, B: Tensor, m: Tensor,
    ) -> Tensor:  # fmt: skip
        length = m / self._norm(weight, A.detach(), B.detach())  # a constant to the gradient (section 4.3)
        x = F.dropout(x.to(A.dtype), self.dropout) if self.dropout else x.to(A.dtype)
        base = y if bias is None else y - bias
        result: Tensor = length * (base.to(A.dtype) + self.scale * F.linear(F.linear(x, A), B))
        return (result if bias is None else result + bias).to(y.dtype)

    def _norm(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """|W + s B A| of each row, [n_out], from |W|^2 + 2 s W . B A + s^2 |B A|^2: nothing of W's size is made.

        Rounding is that of the three terms: it shows where s B A all but cancels a row of W. A row of zeros, as
        published or rounded so by a storage, has the length `SMALLEST`, and so has m at the start: what m is divided by
        is what it is, so the row starts as it is in W, and learns.
        """
        own = torch.linalg.vector_norm(weight, dim=1, dtype=A.dtype)
        shrunk = row_lengths.SHRUNK if weight.dtype is torch.float16 else 1  # where W A' itself may pass what fp16 has
        cross = (B * F.linear(weight, (A if shrunk == 1 else A * shrunk).to(weight.dtype))).sum(1)
        added = (B * (B @ (A @ A.t()))).sum(1)
        squared: Tensor = own * own + 2 * self.scale / shrunk * cross + self.scale**2 * added
        return squared.clamp_min(SMALLEST**2).sqrt()

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings = {"peft_type": "LORA", "r": self.r, "lora_alpha": self.alpha, "use_rslora": False, "bias": "none",
                    "lora_dropout": self.dropout, "use_dora": True}  # fmt: skip
        names = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "m"}
        return settings, {theirs: state[ours] for theirs, ours in names.items()}

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        names = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "m"}
        if not config.get("use_dora") or config.get("kasa_config") is not None or set(tensors) != set(names):
            return None
        r, alpha = config.get("r", 8), config.get("lora_alpha", 8)
        values = {
            "r": r,
            "alpha": alpha * math.sqrt(r) if config.get("use_rslora") else alpha,  # of which the scale is 1/r
            "dropout": config.get("lora_dropout", 0.0),
        }
        return values, {ours: tensors[theirs] for theirs, ours in names.items()}

    def fold(
        self, site: Linear, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        directed = weight.to(state["A"].dtype) + self.scale * state["B"] @ state["A"]
        length = state["m"] / directed.norm(dim=1).clamp_min(SMALLEST)
        return (length[:, None] * directed).to(weight.dtype), bias
