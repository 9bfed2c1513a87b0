"""Orthogonal finetuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from peftc.protocol import Lazy, Tensor, torch
from peftc.protocol.method import Place, State, Step, method, param
from peftc.protocol.params import divisors_near
from peftc.protocol.site import Linear
from peftc.protocol.stages import TurningMethod

if TYPE_CHECKING:
    from peftc.kernels.common import orthogonal
else:
    orthogonal = Lazy("peftc.kernels.common.orthogonal")


@method
class OFT(TurningMethod):
    """Blocks of the inputs are turned, each by an orthogonal matrix, which Cayley's map makes of a skew-symmetric one.

    What is above the diagonal of a block is kept, [blocks, size (size - 1) / 2]. By the series a block turns the
    other way round: as HF PEFT has it.
    """

    name = "oft"
    formula = "y = W R x, R = diag(R_1, ...), R_i = (I + Q_i)(I - Q_i)^-1, Q_i skew-symmetric"
    paper = "Qiu et al. 2023, arXiv:2306.07280; Qiu et al. 2025 (OFTv2), arXiv:2506.19847"
    peft_type = "OFT"
    peft_bias = "oft_only"
    peft_tensors: ClassVar = {"oft_R.weight": "Q"}
    peft_values: ClassVar = {
        "coft": "constrained", "eps": "eps", "block_share": "share", "use_cayley_neumann": "neumann",
        "num_cayley_neumann_terms": "terms",
    }  # fmt: skip
    peft_settings = ("r", "oft_block_size", "module_dropout")  # theirs has no effect on linear layers

    block_size: int | None = param(None, "inputs of a block; else what is nearest to 32, unless blocks is given", min=1)
    blocks: int | None = param(None, "how many blocks there are, instead", min=1, alias="r")
    nearest: bool = param(False, "what is given need not divide the inputs: the nearest that does, as HF PEFT has it")
    share: bool = param(False, "one matrix for all blocks", alias="block_share")
    neumann: bool = param(True, "the inverse is a Neumann series, and R all but orthogonal", alias="use_cayley_neumann")
    terms: int = param(5, "terms of that series", min=1, max=64, alias="num_cayley_neumann_terms")
    constrained: bool = param(False, "each Q_i at most eps/sqrt(blocks) long (COFT)", alias="coft")
    eps: float = param(6e-5, "how far constrained blocks may turn", above=0)

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.scheduled = self.constrained

    def conflict(self) -> str | None:
        if self.block_size and self.blocks:
            return "block_size and blocks say the same"
        if self.nearest and not (self.block_size or self.blocks):
            return "nearest is of a given block_size or blocks"
        if self.changed("terms") and not self.neumann:
            return f"terms={self.terms} is of a Neumann series, and neumann=false"
        if self.changed("eps") and not self.constrained:
            return f"eps={self.eps} is of constrained blocks: write constrained=true, too"
        return None

    def layout(self, site: Linear) -> tuple[int, int]:
        """How many blocks there are, and of how many inputs."""
        if self.blocks:
            blocks = nearest_divisor(site.n_in, self.blocks)
            return blocks, site.n_in // blocks
        size = nearest_divisor(site.n_in, self.block_size or 32)
        return site.n_in // size, size

    def refuses(self, site: Linear) -> str | None:
        name, wanted = ("blocks", self.blocks) if self.blocks else ("block_size", self.block_size)
        if wanted and not self.nearest and site.n_in % wanted:
            return f"{name}={wanted} does not divide its {site.n_in} inputs: {divisors_near(site.n_in, wanted)} do"
        return "it has blocks of one input, which do not turn" if self.layout(site)[1] == 1 else None

    def state(self, site: Linear) -> dict[str, State]:
        blocks, size = self.layout(site)
        return {"Q": State((1 if self.share else blocks, size * (size - 1) // 2))}

    def turn(self, site: Linear, x: Tensor, **state: Tensor) -> Tensor:
        blocks, size = self.layout(site)
        above = state["Q"]
        if self.constrained:  # the gradient is that at the projected one, as if it had been stored
            above = above + (self._projected(above) - above).detach()
        turned = orthogonal.cayley(orthogonal.skew(above, size), self.terms if self.neumann else None)
        return orthogonal.in_blocks(x, turned.expand(blocks, -1, -1))

    def _projected(self, above: Tensor) -> Tensor:
        """Q_i of at most eps/sqrt(blocks), the Frobenius norm of both its halves."""
        longest = self.eps / math.sqrt(len(above))
        length = math.sqrt(2) * above.norm(dim=1, keepdim=True)
        return torch.where(length <= longest, above, above * (longest / length))

    def on_step(self, step: Step, places: Sequence[Place]) -> bool:
        for place in places:
            place.state["Q"].copy_(self._projected(place.state["Q"]))
        return False

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings, tensors = super().to_peft(site, state)
        size = 0 if self.blocks else self.block_size or 32
        return settings | {"r": self.blocks or 0, "oft_block_size": size}, tensors

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        found = super().from_peft(config, module, tensors)
        if found is None:
            return None
        values, state = found
        if not values.get("neumann", True):
            values.pop("terms", None)
        if not values.get("constrained"):
            values.pop("eps", None)
        sizes = {"blocks": config.get("r") or None, "block_size": config.get("oft_block_size") or None}
        return values | sizes | {"nearest": any(sizes.values())}, state


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` nearest to `wanted`, the smaller of two."""
    return min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: (abs(n - wanted), n))
