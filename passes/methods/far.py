"""Freeze and reconfigure: some output rows of a weight learn."""

from __future__ import annotations

from typing import Any

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import PLAIN, Data, Here, State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod


@method
class FAR(WeightMethod):
    """A linear layer split in two: the selected outputs have weights that learn, the other weights are frozen.

    The paper selects by how far a first part of full fine-tuning moves each output's weights. `gradient` asks the
    calibration batches where that would begin: the squared gradients of each example, summed. Without data, `norm`
    takes the outputs whose weights are largest, `random` any.
    """

    name = "far"
    formula = "y[i] = W'[i] x + b[i] + c[i] for the selected outputs i, W x + b elsewhere"
    paper = "Vucetic et al. 2022, arXiv:2205.01541"

    keep: float = param(0.25, "share of the outputs that learn", above=0, max=1)
    select: str = param(
        "norm",
        "which outputs learn: those of largest weights or gradients, or any",
        choices=("norm", "gradient", "random"),
    )

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.data = Data.WEIGHT_GRADIENTS if self.select == "gradient" else None

    def refuses(self, site: Linear) -> str | None:
        if self.data is not None and site.tied:
            return "its weight is tied to another layer's, whose gradients select=gradient would count too"
        return None

    def claims_weight(self) -> str | None:
        return "it trains a copy of some of the weight's rows"

    def state(self, site: Linear) -> dict[str, State]:
        kept = max(1, round(self.keep * site.n_out))
        state = {
            "index": State((kept,), trainable=False, dtype=torch.int64, below=site.n_out),
            "selected": State((kept, site.n_in)),
        }
        return state | ({"shift": State((kept,))} if site.bias else {})

    def initialise(self, site: Linear, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> None:
        known = self.select == "norm"
        self._take(weight, weight.float().norm(dim=1) if known else torch.rand(site.n_out, device=weight.device), state)

    def calibrate(self, site: Linear, weight: Tensor, data: Tensor, state: dict[str, Tensor]) -> None:
        self._take(weight, data.sum(1), state)

    def _take(self, weight: Tensor, score: Tensor, state: dict[str, Tensor]) -> None:
        """Starts from the rows of the largest scores."""
        index = score.topk(len(state["index"])).indices.sort().values
        state["index"].copy_(index)
        state["selected"].copy_(weight[index])

    def rewrite(
        self, site: Linear, x: Tensor, y: Tensor, bias: Tensor | None,
        index: Tensor, selected: Tensor, shift: Tensor | None,
    ) -> Tensor:  # fmt: skip
        # The base computes all rows: less work than to gather the frozen ones in every step. What reaches it in the
        # backward pass is zero at the selected rows.
        part = F.linear(x.to(selected.dtype), selected)
        if bias is not None and shift is not None:
            part = part + (bias.index_select(0, index).to(selected.dtype) + shift)
        return y.index_copy(-1, index, part.to(y.dtype))

    def fold(
        self, site: Linear, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        index = state["index"]
        folded = weight.index_copy(0, index, state["selected"].to(weight.dtype))
        return folded, None if bias is None else bias.index_add(0, index, state["shift"].to(bias.dtype))
