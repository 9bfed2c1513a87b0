"""Weight-decomposed low-rank adaptation."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from peftc.protocol import F, Lazy, Tensor, torch
from peftc.protocol.method import PLAIN, Here, Init, State, method, param
from peftc.protocol.site import Linear, Projection
from peftc.protocol.stages import WeightMethod

from ..sites.conv import Conv, undilated
from ..sites.embed import TENSORS, Embedding

if TYPE_CHECKING:
    from peftc.kernels import row_lengths
else:
    row_lengths = Lazy("peftc.kernels.row_lengths")

# The length of a row of zeros, which is divided by; its square is a normal number of float32.
SMALLEST = 2.0**-63


@method
class DoRA(WeightMethod):
    """LoRA on the direction of every output row, of a convolution every channel, and a trained length for it.

    Of an embedding these are the features: each has a length over all rows of the table.
    """

    name = "dora"
    formula = "y = m * (W + (alpha/r) B A) x / |W + (alpha/r) B A|"
    paper = "Liu et al. 2024, arXiv:2402.09353"
    peft_type = "LORA"
    site = Linear | Conv | Embedding
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

    def refuses(self, site: Projection) -> str | None:
        if isinstance(site, Embedding):
            return site.undropped(self.dropout)
        grouped = isinstance(site, Conv) and site.groups > 1
        return "B A is no change of a grouped weight, whose lengths it would have" if grouped else None

    def unmergeable_at(self, site: Projection) -> str | None:
        return site.unmergeable if isinstance(site, Embedding) else None

    def claims_weight(self) -> str | None:
        return "its lengths are those of the weight's own rows"

    def state(self, site: Projection) -> dict[str, State]:
        start: tuple[Init, Init] = partial(torch.nn.init.kaiming_uniform_, a=math.sqrt(5)), torch.nn.init.zeros_
        if isinstance(site, Embedding):
            start = torch.nn.init.zeros_, torch.nn.init.normal_
        kernel = site.kernel if isinstance(site, Conv) else ()
        return {
            "A": State((self.r, site.n_in, *kernel), start[0]),
            "B": State((site.n_out, self.r, *(1 for _ in kernel)), start[1]),
            "m": State((site.n_out,), torch.nn.init.ones_),
        }

    def initialise(self, site: Projection, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> None:
        state["m"].copy_(weight.to(state["m"].dtype).flatten(1).norm(dim=1).clamp_min(SMALLEST))

    def keeps(self, site: Projection) -> int | None:
        return None if isinstance(site, Linear) else self.r + site.n_out  # what m is multiplied by, too

    def rewrite(
        self, site: Projection, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None,
        A: Tensor, B: Tensor, m: Tensor,
    ) -> Tensor:  # fmt: skip
        if isinstance(site, Conv):
            return self._convolved(site, x, y, weight, bias, A, B, m)
        length = m / self._norm(weight, A.detach(), B.detach())  # a constant to the gradient (section 4.3)
        if isinstance(site, Embedding):
            moved: Tensor = length * (y.to(A.dtype) + self.scale * F.linear(site.look_up(x, A), B))
            return moved.to(y.dtype)
        x = F.dropout(x.to(A.dtype), self.dropout) if self.dropout else x.to(A.dtype)
        base = y if bias is None else y - bias
        result: Tensor = length * (base.to(A.dtype) + self.scale * F.linear(F.linear(x, A), B))
        return (result if bias is None else result + bias).to(y.dtype)

    def _convolved(
        self, site: Conv, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, m: Tensor
    ) -> Tensor:
        length = m / self._norm(weight.flatten(1), A.detach().flatten(1), B.detach().flatten(1))
        x = F.dropout(x.to(A.dtype), self.dropout) if self.dropout else x.to(A.dtype)
        base = y if bias is None else y - site.beside(bias)
        result = site.beside(length) * (base.to(A.dtype) + self.scale * site.mix(site.convolve(x, A), B))
        return (result if bias is None else result + site.beside(bias)).to(y.dtype)

    def unexportable(self, site: Projection) -> str | None:
        return undilated(site)

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

    def to_peft(self, site: Projection, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings = {"peft_type": "LORA", "r": self.r, "lora_alpha": self.alpha, "use_rslora": False, "bias": "none",
                    "lora_dropout": self.dropout, "use_dora": True}  # fmt: skip
        if isinstance(site, Embedding):  # which their dropout passes by
            del settings["lora_dropout"]
            return settings, {**{t: state[ours] for t, ours in TENSORS.items()}, "lora_magnitude_vector": state["m"]}
        lengths = state["m"].reshape(1, *site.beside(state["m"]).shape) if isinstance(site, Conv) else state["m"]
        return settings, {"lora_A.weight": state["A"], "lora_B.weight": state["B"], "lora_magnitude_vector": lengths}

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        is_table = tensors.keys() >= TENSORS.keys()
        names = (TENSORS if is_table else {"lora_A.weight": "A", "lora_B.weight": "B"}) | {"lora_magnitude_vector": "m"}
        if not config.get("use_dora") or config.get("kasa_config") is not None or set(tensors) != set(names):
            return None
        r, alpha = config.get("r", 8), config.get("lora_alpha", 8)
        values = {
            "r": r,
            "alpha": alpha * math.sqrt(r) if config.get("use_rslora") else alpha,  # of which the scale is 1/r
            "dropout": 0.0 if is_table else config.get("lora_dropout", 0.0),
        }
        state = {ours: tensors[theirs] for theirs, ours in names.items()}
        return values, state | {"m": state["m"].flatten()}  # of a convolution [1, n_out, 1, …]

    def fold(
        self, site: Projection, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        added = self.scale * state["B"].flatten(1) @ state["A"].flatten(1)
        directed = weight.to(added.dtype).flatten(1) + added
        length = state["m"] / directed.norm(dim=1).clamp_min(SMALLEST)
        return (length[:, None] * directed).reshape(weight.shape).to(weight.dtype), bias
