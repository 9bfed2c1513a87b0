"""Super-Tuning."""

from __future__ import annotations

from typing import Any, ClassVar

from peftc.protocol import Tensor, torch
from peftc.protocol.method import PLAIN, Here, State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import EntriesMethod


@method
class SuperTuning(EntriesMethod):
    """The entries of the weight that are largest at the start learn, or the smallest."""

    name = "supertuning"
    formula = "y = (W + D) x, D zero but for the largest (1 - sparsity) n_in n_out entries of |W|"
    paper = "Super-Tuning 2026, arXiv:2607.09287"
    peft_type = "SUPERTUNING"
    peft_transposed = False
    peft_values: ClassVar = {"sparsity": "sparsity", "select_top": "largest"}
    peft_settings = ("save_precomputed_indices",)

    sparsity: float = param(0.99, "share of entries that stay", min=0, max=0.999999)
    largest: bool = param(True, "the largest, and not the smallest", alias="select_top")

    def many(self, site: Linear) -> int:
        return int(site.n_in * site.n_out * (1 - self.sparsity))

    def refuses(self, site: Linear) -> str | None:
        return f"sparsity={self.sparsity:g} leaves none of its weights to learn" if not self.many(site) else None

    def state(self, site: Linear) -> dict[str, State]:
        many, size = (self.many(site),), site.n_out * site.n_in
        return {"values": State(many), "indices": State(many, trainable=False, dtype=torch.int64, below=size)}

    def initialise(self, site: Linear, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> None:
        state["indices"].copy_(weight.abs().flatten().topk(self.many(site), largest=self.largest).indices)

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings, _ = super().to_peft(site, state)
        tensors = {"supertuning_values": state["values"], "supertuning_indices": state["indices"].to(torch.int32)}
        return settings | {"save_precomputed_indices": True}, tensors

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        values = {ours: config[theirs] for theirs, ours in cls.peft_values.items() if theirs in config}
        state = {name.removeprefix("supertuning_"): tensor for name, tensor in tensors.items()}
        if not {"values"} <= state.keys() <= {"values", "indices"}:
            return None
        return values, {name: tensor.long() if name == "indices" else tensor for name, tensor in state.items()}
