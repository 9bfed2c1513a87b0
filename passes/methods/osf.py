"""Orthogonal subspace finetuning."""

from __future__ import annotations

from typing import Any

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import PLAIN, Here, State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod

NAMES = {f"osf_svd_params.{name}_low": name for name in "USV"}


@method
class OSF(WeightMethod):
    """The weight's leading singular directions stay, all the others learn, at right angles to those that stay.

    U [n_out, m], S [m] and V [m, n_in] start as what lies behind the first `kept` of the decomposition. Their gradients
    lose what points along the directions kept: what was learned before, which is there, is not written over.
    """

    name = "osf"
    formula = "y = W x + (U diag(S) V - U0 diag(S0) V0) x, the gradients of U and V orthogonal to the directions kept"
    paper = "Nayak et al. 2025, arXiv:2504.07097"
    indivisible = "it starts as two equal products, of which one is taken from the other"
    peft_type = "OSF"
    peft_settings = ("effective_rank", "rank_pattern", "target_svd_config")  # the tensors have the rank
    peft_transposed = False

    kept: int | None = param(None, "directions that stay; half of all, if not given", min=1, alias="effective_rank")

    def low(self, site: Linear) -> int:
        """How many directions learn, m."""
        small = min(site.n_in, site.n_out)
        return small - (small // 2 if self.kept is None else self.kept)

    def refuses(self, site: Linear) -> str | None:
        small = min(site.n_in, site.n_out)
        if small < 2:
            return "it has one direction, and some stay and some learn"
        return None if self.low(site) > 0 else f"kept={self.kept} leaves none of its {small} directions to learn"

    def state(self, site: Linear) -> dict[str, State]:
        low = self.low(site)
        high = min(site.n_in, site.n_out) - low
        shapes: dict[str, tuple[int, ...]] = {"U": (site.n_out, low), "S": (low,), "V": (low, site.n_in)}
        state = {name: State(shape) for name, shape in shapes.items()}
        state |= {f"{name}0": State(shape, trainable=False) for name, shape in shapes.items()}
        if site.n_out > site.n_in:  # else what is at right angles to them is what U0 spans
            state["U_kept"] = State((site.n_out, high), trainable=False)
        if site.n_in > site.n_out:
            state["V_kept"] = State((high, site.n_in), trainable=False)
        return state

    def initialise(self, site: Linear, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> None:
        left, singular, right = torch.linalg.svd(weight.float(), full_matrices=False)
        high = len(singular) - self.low(site)
        parts = {"U": left[:, high:], "S": singular[high:], "V": right[high:]}
        parts |= {f"{name}0": tensor for name, tensor in parts.items()}
        for name, tensor in (parts | {"U_kept": left[:, :high], "V_kept": right[:high]}).items():
            if name in state:
                state[name].copy_(tensor)

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, **state: Tensor) -> Tensor:
        u = _steered(state["U"], state["U0"], state.get("U_kept"))
        v = _steered(state["V"].t(), state["V0"].t(), None if "V_kept" not in state else state["V_kept"].t())
        x = x.to(u.dtype)
        learned = F.linear((x @ v) * state["S"], u)
        branch = learned - F.linear(F.linear(x, state["V0"]) * state["S0"], state["U0"])
        return y + branch.to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        return (state["U"] * state["S"]) @ state["V"] - (state["U0"] * state["S0"]) @ state["V0"]

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {theirs: state[ours] for theirs, ours in NAMES.items()}
        return {"peft_type": "OSF", "effective_rank": self.kept}, tensors

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if set(tensors) != set(NAMES):
            return None
        state = {ours: tensors[theirs] for theirs, ours in NAMES.items()}
        small = min(state["U"].shape[0], state["V"].shape[-1])
        kept = small - len(state["S"])
        return {"kept": None if kept == small // 2 and config.get("effective_rank") is None else kept}, state


def _steered(low: Tensor, start: Tensor, kept: Tensor | None) -> Tensor:
    """`low` [n, m], whose gradient is projected onto what is at right angles to what is kept."""
    change = low - low.detach()  # nothing, but for its gradient
    if kept is None:
        return low.detach() + start @ (start.t() @ change)
    return low.detach() + change - kept @ (kept.t() @ change)
