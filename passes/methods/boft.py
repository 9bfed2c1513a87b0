"""Orthogonal finetuning by butterflies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from peftc.protocol import F, Lazy, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.params import divisors_near
from peftc.protocol.site import Linear
from peftc.protocol.stages import TurningMethod

if TYPE_CHECKING:
    from peftc.kernels.common import orthogonal
else:
    orthogonal = Lazy("peftc.kernels.common.orthogonal")


@method
class BOFT(TurningMethod):
    """OFT whose blocks are turned in several rounds, between which inputs change places; and a length for each output.

    In round i the halves of the blocks of 2^i neighbours are shuffled, turned, and put back.
    """

    name = "boft"
    formula = (
        "y = s * (W B_1 ... B_m x), B_i = P_i diag(R_1, ...) P_i', R_j = (I + Q_j)(I - Q_j)^-1, Q_j = (A_j - A_j')/2"
    )
    paper = "Liu et al. 2023, arXiv:2311.06243"
    peft_type = "BOFT"
    peft_bias = "boft_only"
    peft_tensors: ClassVar = {"boft_R": "A", "boft_s": "s"}
    peft_values: ClassVar = {"boft_dropout": "dropout"}
    peft_settings = ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor")

    block_size: int = param(4, "inputs of a block", min=2, alias="boft_block_size")
    factors: int = param(1, "rounds in which blocks are turned", min=1, max=30, alias="boft_n_butterfly_factor")
    dropout: float = param(0.0, "share of blocks that stay as they are in a step, in training", min=0, max=0.99)

    def refuses(self, site: Linear) -> str | None:
        together = self.block_size * 2 ** (self.factors - 1)
        if site.n_in % together:
            near = divisors_near(site.n_in, together)
            return f"block_size * 2^(factors - 1) = {together} does not divide its {site.n_in} inputs: {near} do"
        return "factors > 1 needs an even block_size" if self.factors > 1 and self.block_size % 2 else None

    def state(self, site: Linear) -> dict[str, State]:
        blocks = site.n_in // self.block_size
        return {
            "A": State((self.factors, blocks, self.block_size, self.block_size)),
            "s": State((site.n_out, 1), torch.nn.init.ones_),
        }

    def turn(self, site: Linear, x: Tensor, **state: Tensor) -> Tensor:
        return self._turned(x, orthogonal.cayley((state["A"] - state["A"].mT) / 2))

    def _turned(self, x: Tensor, blocks: Tensor) -> Tensor:
        for place in reversed(range(self.factors)):
            x = _unshuffled(
                orthogonal.in_blocks(_shuffled(x, self.block_size, place), blocks[place]), self.block_size, place
            )
        return x

    def rewrites_input(self, site: Linear) -> bool:
        return False

    def rewrite(
        self, site: Linear, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None, **state: Tensor
    ) -> Tensor:
        s, wide, blocks = state["s"][:, 0], x.to(state["A"].dtype), orthogonal.cayley((state["A"] - state["A"].mT) / 2)
        if self.dropout:
            kept = F.dropout(blocks.new_ones(blocks.shape[:2]), self.dropout) > 0
            still = torch.eye(self.block_size, dtype=blocks.dtype, device=blocks.device)
            blocks = torch.where(kept[..., None, None], blocks, still)
        moved = F.linear((self._turned(wide, blocks) - wide).to(x.dtype), weight.to(x.dtype))
        base = (y if bias is None else y - bias).to(s.dtype)
        return y + (s * moved + (s - 1) * base).to(y.dtype)

    def fold(
        self, site: Linear, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        turned, bias = super().fold(site, weight.to(state["s"].dtype), bias, state)
        return (state["s"] * turned).to(weight.dtype), bias

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings, tensors = super().to_peft(site, state)
        sizes = {"boft_block_size": self.block_size, "boft_block_num": 0, "boft_n_butterfly_factor": self.factors}
        return settings | sizes, tensors

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Sizes are the tensors': without its own CUDA kernel HF PEFT makes one factor, whatever its settings say."""
        found = super().from_peft(config, module, tensors)
        if found is None or tensors["boft_R"].dim() != 4:
            return None
        factors, _, size, _ = tensors["boft_R"].shape
        return found[0] | {"block_size": size, "factors": factors}, found[1]


def _shuffled(x: Tensor, size: int, place: int) -> Tensor:
    """Of 2^place blocks, each of two halves, the first half of all halves and the second take turns."""
    return x.unflatten(-1, (-1, 2, 2**place, size // 2)).transpose(-2, -3).flatten(-4) if place else x


def _unshuffled(x: Tensor, size: int, place: int) -> Tensor:
    return x.unflatten(-1, (-1, 2**place, 2, size // 2)).transpose(-2, -3).flatten(-4) if place else x
