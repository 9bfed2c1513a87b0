"""A sparse difference from the frozen weights, learned and pruned while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod

if TYPE_CHECKING:
    from peftc.protocol.method import Place, Step

# The stretched interval of the hard concrete distribution, (l, r) in the paper, symmetric about 1/2 of its sigmoid.
LOW, HIGH = -1.5, 1.5


@method
class DiffPruning(WeightMethod):
    """A dense difference times hard-concrete gates that an L0 penalty closes; at a set step all but a share is cut.

    The cut keeps the largest |z w| of all the statement's weights together. After it the gates are gone and what was
    kept trains on.
    """

    name = "diff_pruning"
    formula = "y = (W + z * D) x, z = clamp(sigmoid(log u/(1-u) + a) (r - l) + l), penalty * sum P(z > 0)"
    paper = "Guo et al. 2020, arXiv:2012.07463; Louizos et al. 2018, arXiv:1712.01312"
    scheduled = True

    sparsity: float = param(0.005, "share of entries that may differ in the end", above=0, max=1)
    prune: int = param(1000, "the step after which only that share is left", min=1)
    l0: float = param(1.25e-7, "weight of the penalty on each entry's probability not to be zero", min=0)

    def state(self, site: Linear) -> dict[str, State]:
        shape = (site.n_out, site.n_in)
        return {
            "w": State(shape),
            "alpha": State(shape, partial(torch.nn.init.constant_, val=5.0)),
            "mask": State(shape, torch.nn.init.ones_, trainable=False),
            "pruned": State((1,), trainable=False),
        }

    def rewrite(
        self, site: Linear, x: Tensor, y: Tensor, training: Tensor,
        w: Tensor, alpha: Tensor, mask: Tensor, pruned: Tensor,
    ) -> Tensor:  # fmt: skip
        uniform = torch.where(training > 0, torch.rand_like(alpha).clamp(1e-6, 1 - 1e-6), 0.5)
        change = self._change(w, alpha, mask, pruned, torch.logit(uniform))
        branch: Tensor = F.linear(x.to(change.dtype), change)
        return y + branch.to(y.dtype)

    def _change(self, w: Tensor, alpha: Tensor, mask: Tensor, pruned: Tensor, noise: Tensor) -> Tensor:
        gates = (torch.sigmoid(noise + alpha) * (HIGH - LOW) + LOW).clamp(0, 1)
        return w * mask * torch.where(pruned > 0, 1.0, gates)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        return self._change(**state, noise=torch.zeros_like(state["alpha"]))

    def penalty(self, site: Linear, state: Mapping[str, Tensor]) -> Tensor:
        # P(z > 0) = sigmoid(a - log(-l/r)), and l = -r
        return self.l0 * (1 - state["pruned"].squeeze()) * torch.sigmoid(state["alpha"]).sum()

    def misfit(self, total: int | None) -> str | None:
        if total is not None and total < self.prune:
            return f"it is pruned after step {self.prune}, and there are {total}: give a smaller prune="
        return None

    def on_step(self, step: Step, places: Sequence[Place]) -> bool:
        if step.number != self.prune:
            return False
        changes = [self.delta(place.site, **place.state) for place in places]  # type: ignore[arg-type]
        sizes = torch.cat([change.abs().flatten() for change in changes])
        kept = torch.zeros_like(sizes)
        kept[sizes.topk(max(1, round(self.sparsity * len(sizes)))).indices] = 1
        for place, change, mask in zip(places, changes, kept.split([c.numel() for c in changes]), strict=True):
            place.state["mask"].copy_(mask.reshape(change.shape))
            place.state["w"].copy_(change * place.state["mask"])
            place.state["pruned"].fill_(1)
            step.forget(place.state["w"])
        return True
