"""Sparse high-rank adaptation."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from peftc.protocol import Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import EntriesMethod


@method
class SHiRA(EntriesMethod):
    """A few entries of the weight learn, drawn at random, as many as a LoRA of rank r has numbers."""

    name = "shira"
    formula = "y = (W + D) x, D zero but for r (n_in + n_out) entries"
    paper = "Bhardwaj et al. 2024, arXiv:2406.13175"
    peft_type = "SHIRA"
    peft_transposed = False
    peft_values: ClassVar = {"r": "r"}
    peft_settings = ("mask_type", "random_seed")  # the places are in the folder

    r: int = param(32, "rank of the LoRA with as many numbers", min=1, alias="rank")
    seed: int = param(0, "seed of the places, for each weight anew", min=0, alias="random_seed")

    def many(self, site: Linear) -> int:
        return self.r * (site.n_in + site.n_out)

    def refuses(self, site: Linear) -> str | None:
        size = site.n_in * site.n_out
        return f"r={self.r} makes more entries than its {size} weights" if self.many(site) > size else None

    def state(self, site: Linear) -> dict[str, State]:
        many = (self.many(site),)
        draw = partial(_drawn, seed=self.seed, shape=(site.n_out, site.n_in))
        rows = State(many, partial(draw, dim=0), trainable=False, dtype=torch.int64, below=site.n_out)
        columns = State(many, partial(draw, dim=1), trainable=False, dtype=torch.int64, below=site.n_in)
        return {"values": State(many), "row": rows, "column": columns}

    def numbers(self, site: Linear, state: dict[str, Tensor]) -> Tensor:
        return state["row"] * site.n_in + state["column"]

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings, _ = super().to_peft(site, state)
        indices = torch.stack([state["row"], state["column"]]).to(torch.int32)
        return settings | {"random_seed": self.seed}, {"shira_weight": state["values"], "shira_indices": indices}

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if set(tensors) != {"shira_weight", "shira_indices"}:
            return None
        rows, columns = tensors["shira_indices"].long()
        state = {"values": tensors["shira_weight"], "row": rows, "column": columns}
        return {"r": config.get("r", 32), "seed": config.get("random_seed")}, state


def _drawn(places: Tensor, *, seed: int, shape: tuple[int, int], dim: int) -> Tensor:
    drawn = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))[: len(places)].sort()
    return places.copy_(drawn.values % shape[1] if dim else drawn.values // shape[1])
