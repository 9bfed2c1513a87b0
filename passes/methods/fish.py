"""The few weights that matter most, by Fisher information."""

from __future__ import annotations

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import Data, State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod


@method
class Fish(WeightMethod):
    """A change of the entries of W that carry most Fisher information; the rest of W stays as it is.

    The information is empirical: the squared gradient of each calibration example's loss, summed. The paper ranks all
    weights of a model together; here each weight keeps its own share, so that a plan knows every size.
    """

    name = "fish"
    formula = "y = (W + mask * D) x, mask: the largest sum over examples of (dL/dW)^2"
    paper = "Sung et al. 2021 (FISH mask), arXiv:2111.09839"
    data = Data.WEIGHT_GRADIENTS

    keep: float = param(0.005, "share of each weight's entries that learns", above=0, max=1)

    def refuses(self, site: Linear) -> str | None:
        return "its weight is tied to another layer's, whose gradients it would count too" if site.tied else None

    def state(self, site: Linear) -> dict[str, State]:
        kept = max(1, round(self.keep * site.n_in * site.n_out))
        places = State((kept,), trainable=False, dtype=torch.int64, below=site.n_in * site.n_out)
        return {"values": State((kept,)), "places": places}

    def calibrate(self, site: Linear, weight: Tensor, data: Tensor, state: dict[str, Tensor]) -> None:
        places = state["places"]
        places.copy_(data.flatten().topk(len(places)).indices.sort().values)

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, values: Tensor, places: Tensor) -> Tensor:
        change = self.delta(site, values=values, places=places)
        branch: Tensor = F.linear(x.to(change.dtype), change)
        return y + branch.to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        values = state["values"]
        empty = values.new_zeros(site.n_out * site.n_in)
        return empty.index_add(0, state["places"], values).reshape(site.n_out, site.n_in)
