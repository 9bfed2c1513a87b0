"""Adaptive budget allocation for low-rank adaptation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from peftc.protocol import F, Tensor, torch
from peftc.protocol.method import State, method, param
from peftc.protocol.site import Linear
from peftc.protocol.stages import WeightMethod

if TYPE_CHECKING:
    from peftc.protocol.method import Place, Step

LEARNS = ("P", "E", "Q")
NAMES = {"lora_A": "Q", "lora_B": "P", "lora_E": "E"}
SENSITIVITY, UNCERTAINTY = "peftc_sensitivity", "peftc_uncertainty"


@method
class AdaLoRA(WeightMethod):
    """A product P E Q like a singular value decomposition, whose least important triplets are cut as training goes on.

    P [n_out, r], E [r, 1] the diagonal, Q [r, n_in]; a penalty keeps P and Q orthogonal. The budget, the number of
    triplets that stay in all sites of the statement together, falls from r to `target` a site (equation 12); the
    importance of a triplet is the smoothed |parameter * gradient| times its uncertainty (equations 8 to 11). A cut
    triplet has its entry of E set to zero, and may come back while the budget still falls. What the importance is
    smoothed from stays with the optimiser's state: a checkpoint of that goes on where it was.
    """

    name = "adalora"
    formula = "y = W x + (alpha/r) P E Q x, E diagonal; loss + orthogonality * mean(|P'P - I| + |QQ' - I|)"
    paper = "Zhang et al. 2023, arXiv:2303.10512"
    peft_type = "ADALORA"
    peft_settings = (
        "init_r", "target_r", "lora_alpha", "lora_dropout", "total_step", "tinit", "tfinal", "deltaT", "beta1", "beta2",
        "orth_reg_weight", "rank_pattern", "r",
    )  # fmt: skip
    scheduled = True

    r: int = param(12, "triplets of each site at first", min=1, alias="init_r")
    target: int = param(8, "triplets a site at the end, on average", min=1, alias="target_r")
    alpha: float = param(16.0, "the branch is scaled by alpha/r", above=0)
    dropout: float = param(0.0, "dropout on x, in training", min=0, max=0.99)
    steps: int | None = param(None, "training steps in all; a Trainer's own if not given", min=1, alias="total_step")
    warmup: int = param(0, "steps before the budget falls", min=0, alias="tinit")
    final: int = param(0, "steps at the end with the triplets that are left", min=0, alias="tfinal")
    interval: int = param(1, "steps between two cuts", min=1, alias="deltaT")
    beta1: float = param(0.85, "smoothing of the importance", above=0, max=0.9999)
    beta2: float = param(0.85, "smoothing of its uncertainty", above=0, max=0.9999)
    orthogonality: float = param(0.5, "weight of the penalty", min=0, alias="orth_reg_weight")

    @property
    def scale(self) -> float:
        """The factor of P E Q, with the small number that HF PEFT adds to the rank."""
        return self.alpha / (self.r + 1e-5)

    def conflict(self) -> str | None:
        if self.target > self.r:
            return f"target={self.target} is more than the r={self.r} that there are at first"
        if self.steps is not None and self.warmup + self.final >= self.steps:
            return f"warmup + final leave none of the {self.steps} steps to cut in"
        return None

    def shared(self, sites: Sequence[Linear]) -> dict[str, State]:
        count = partial(torch.nn.init.constant_, val=float(len(sites)))
        return {"sites": State((), count, trainable=False)}

    def state(self, site: Linear) -> dict[str, State]:
        start = partial(torch.nn.init.normal_, std=0.02)
        return {
            "P": State((site.n_out, self.r), start),
            "E": State((self.r, 1)),
            "Q": State((self.r, site.n_in), start),
            "kept": State((self.r, 1), torch.nn.init.ones_, trainable=False, dtype=torch.bool),
        }

    def rewrite(self, site: Linear, x: Tensor, y: Tensor, P: Tensor, E: Tensor, Q: Tensor) -> Tensor:
        x = F.dropout(x.to(Q.dtype), self.dropout) if self.dropout else x.to(Q.dtype)
        branch: Tensor = self.scale * F.linear(F.linear(x, Q * E), P)
        return y + branch.to(y.dtype)

    def delta(self, site: Linear, **state: Tensor) -> Tensor:
        return self.scale * state["P"] @ (state["E"] * state["Q"])

    def penalty(self, site: Linear, state: Mapping[str, Tensor]) -> Tensor:
        p, q = state["P"], state["Q"]
        identity = torch.eye(self.r, dtype=p.dtype, device=p.device)
        off = (p.T @ p - identity).norm() + (q @ q.T - identity).norm()
        penalty: Tensor = self.orthogonality / (2 * state["sites"]) * off
        return penalty

    # The schedule, step by step as HF PEFT's `update_and_allocate`

    def misfit(self, total: int | None) -> str | None:
        steps = self.steps or total
        if steps is None:
            return "it needs the number of steps: give steps=, or follow(…, total=)"
        if self.warmup + self.final >= steps:
            return f"warmup={self.warmup} and final={self.final} leave none of {steps} steps to cut in"
        return None

    def on_step(self, step: Step, places: Sequence[Place]) -> bool:
        steps = self.steps or step.total
        assert steps is not None, "`misfit` asked"
        if step.number > steps - self.final:  # what was cut stays cut
            for place in places:
                place.state["E"].masked_fill_(~place.state["kept"], 0)
            return False
        if step.number < steps - self.final:
            for place in places:
                for name in LEARNS:
                    self._watch(step, place.state[name])
        budget, cuts = self.budget(step.number, steps, len(places))
        if cuts:
            self._cut(step, places, budget)
        if step.number == steps - self.final:
            self._forget(step, places)
        return False

    def budget(self, step: int, steps: int, sites: int) -> tuple[int, bool]:
        """How many triplets stay in all sites, and whether others are cut at this step."""
        first, last, end = self.r * sites, self.target * sites, steps - self.final
        if step <= self.warmup:
            return first, step == end
        share = 1 - (step - self.warmup) / (end - self.warmup)
        return int((first - last) * share**3 + last), step % self.interval == 0 or step == end

    def _watch(self, step: Step, tensor: Tensor) -> None:
        """Updates what the importance of each entry is smoothed from, beside the optimiser's own moments."""
        if tensor.grad is None:
            return
        kept: dict[str, Tensor] = step.optimizer.state[tensor]
        now = (tensor * tensor.grad).abs()
        mean = self.beta1 * kept.get(SENSITIVITY, torch.zeros_like(now)) + (1 - self.beta1) * now
        spread = self.beta2 * kept.get(UNCERTAINTY, torch.zeros_like(now)) + (1 - self.beta2) * (now - mean).abs()
        kept |= {SENSITIVITY: mean, UNCERTAINTY: spread}

    def _cut(self, step: Step, places: Sequence[Place], budget: int) -> None:
        """Zeroes the entries of E of all but the `budget` most important triplets."""

        def importance(tensor: Tensor) -> Tensor:
            kept = step.optimizer.state[tensor]
            return kept[SENSITIVITY] * kept[UNCERTAINTY] if SENSITIVITY in kept else torch.zeros_like(tensor)

        surplus = self.r * len(places) - budget
        if not surplus:
            return
        scores = []
        for place in places:
            p, e, q = (importance(place.state[name]) for name in LEARNS)
            scores.append(e[:, 0] + (q.mean(1) + p.mean(0)))
        threshold = torch.cat([score.cpu() for score in scores]).kthvalue(surplus).values
        for place, score in zip(places, scores, strict=True):
            place.state["kept"].copy_(score[:, None] > threshold.to(score.device))
            place.state["E"].masked_fill_(~place.state["kept"], 0)

    def _forget(self, step: Step, places: Sequence[Place]) -> None:
        for place in places:
            for name in LEARNS:
                for key in (SENSITIVITY, UNCERTAINTY):
                    step.optimizer.state[place.state[name]].pop(key, None)

    # HF PEFT's checkpoints hold the triplets that are left, and say which they are

    def to_peft(self, site: Linear, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        steps = self.steps or self.warmup + self.final + 1
        settings: dict[str, Any] = {
            "peft_type": "ADALORA", "init_r": self.r, "target_r": self.target, "lora_alpha": self.alpha,
            "lora_dropout": self.dropout, "tinit": self.warmup, "tfinal": self.final, "deltaT": self.interval,
            "beta1": self.beta1, "beta2": self.beta2, "orth_reg_weight": self.orthogonality, "total_step": steps,
            "bias": "none",
        }  # fmt: skip
        kept = (state["kept"].bool() | (state["E"] != 0))[:, 0]  # between two cuts, one that was cut may grow again
        if not kept.all():
            settings["rank_pattern"] = {f"{site.name}.lora_E": kept.tolist()}
        return settings, {"lora_A": state["Q"][kept], "lora_B": state["P"][:, kept], "lora_E": state["E"][kept]}

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if set(tensors) != set(NAMES):
            return None
        r = config.get("init_r", 12)  # theirs may have an r, too, which is never used
        given = (config.get("rank_pattern") or {}).get(f"{module}.lora_E")
        kept = torch.tensor(given) if given is not None else torch.ones(len(tensors["lora_E"]), dtype=torch.bool)
        state = {}
        for theirs, ours in NAMES.items():
            left, dim = tensors[theirs], 1 if ours == "P" else 0
            if given is not None:
                if len(kept) != r or left.shape[dim] != kept.sum():
                    left_of = f"leaves {int(kept.sum())} of init_r={r}"
                    raise ValueError(f"its rank_pattern {left_of} at {module}, not {theirs}'s")
                shape = (*left.shape[:dim], r, *left.shape[dim + 1 :])
                left = left.new_zeros(shape).index_copy(dim, kept.nonzero()[:, 0], left)
            state[ours] = left
        theirs_too = {"target": "target_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "steps": "total_step",
                      "warmup": "tinit", "final": "tfinal", "interval": "deltaT", "beta1": "beta1", "beta2": "beta2",
                      "orthogonality": "orth_reg_weight"}  # fmt: skip
        values = {ours: config[theirs] for ours, theirs in theirs_too.items() if theirs in config}
        values.setdefault("alpha", 8)
        values["target"] = min(values.get("target", 8), r)  # theirs may be larger, where it is never used
        return {"r": r, **values}, state | {"kept": kept[:, None]}
