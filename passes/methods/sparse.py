"""A method whose matrices are pruned before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftc.protocol import Tensor, torch
from peftc.protocol.combinator import INNER, Combinator
from peftc.protocol.method import PLAIN, REQUIRED, Data, Here, Method, State, method, param

Probed = Mapping[str, tuple[Tensor, Tensor]]  # state name -> its values and their gradients, in the probe


@method
class Sparse(Combinator):
    """Of each matrix only the entries kept at the start exist: their places are fixed, their values learn.

    A matrix that starts at zero has no magnitudes to judge by: its entries are judged at small random numbers, and
    start at zero all the same.
    """

    name = "sparse"
    formula = "f with each matrix M replaced by mask * M; the mask keeps the entries of the largest score"
    paper = "He et al. 2022 (SparseAdapter), arXiv:2210.04284; SNIP: Lee et al. 2019, arXiv:1810.02340"

    method: Method = param(REQUIRED, "what is pruned")
    density: float = param(0.2, "share of each matrix that is kept", above=0, max=1)
    by: str = param(
        "magnitude",
        "the score: |w|; snip: |w dL/dw| over calibration batches; or random",
        choices=("magnitude", "snip", "random"),
    )

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.data = Data.STATE_GRADIENTS if self.by == "snip" else None

    def conflict(self) -> str | None:
        inner = self.method
        if reason := inner.claims_weight():  # its start may be the weight itself, of which nothing must go missing
            return f"{inner.name} cannot be part of it: {reason}"
        return super().conflict()

    def refuses(self, site: Any) -> str | None:
        if (reason := super().refuses(site)) is not None:
            return reason
        return None if self._pruned(site) else f"{self.method.name} learns no matrix that could be pruned"

    def probe(self) -> Method:
        return self.method

    def _pruned(self, site: Any) -> dict[str, State]:
        """The inner method's matrices, by its own names."""
        inner = self.method.state(site)
        return {name: spec for name, spec in inner.items() if spec.trainable and len(spec.shape) > 1}

    def state(self, site: Any) -> dict[str, State]:
        state = super().state(site)
        for name, spec in self._pruned(site).items():
            size = torch.Size(spec.shape).numel()
            kept = max(1, round(self.density * size))
            del state[INNER + name]
            state[f"{INNER}{name}.values"] = State((kept,))
            state[f"{INNER}{name}.places"] = State((kept,), trainable=False, dtype=torch.int64, below=size)
        return state

    def initialise(self, site: Any, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> None:
        self._start(site, weight, state, {}, here)

    def calibrate(self, site: Any, weight: Tensor, data: Probed, state: dict[str, Tensor]) -> None:
        self._start(site, weight, state, data, PLAIN)

    def _start(self, site: Any, weight: Tensor, state: dict[str, Tensor], probed: Probed, here: Here) -> None:
        """Fills places by the scores, and values by the inner method's own start: the one that was probed, if any."""
        pruned = self._pruned(site)
        dense = {name: spec.init(_like(state[f"{INNER}{name}.values"], spec.shape)) for name, spec in pruned.items()}
        rest = {name.removeprefix(INNER): t for name, t in state.items() if name.removeprefix(INNER) not in pruned}
        self.method.initialise(site, weight, rest | dense, here)
        for name, (start, _) in probed.items():
            own = dense[name] if name in dense else rest[name]
            if own.any():  # the probe's random numbers in place of zeros are for judging only
                own.copy_(start)
        for name, start in dense.items():
            score = _score(*probed[name]) if name in probed else self._judged(start)
            places = state[f"{INNER}{name}.places"]
            places.copy_(score.flatten().abs().topk(len(places)).indices.sort().values)
            state[f"{INNER}{name}.values"].copy_(start.flatten()[places])

    def _judged(self, start: Tensor) -> Tensor:
        """The score of each entry without data."""
        if self.by == "random":
            return torch.rand_like(start)
        return start if start.any() else _probe_start(torch.empty_like(start))

    def rewrite(self, site: Any, x: Tensor, y: Tensor, **known: Tensor) -> Tensor:
        return self.inner_output(site, x, y, self._whole(site, known))

    def rewrite_input(self, site: Any, x: Tensor, **known: Tensor) -> Tensor:
        return self.inner_input(site, x, self._whole(site, known))

    def extend(self, site: Any, **known: Any) -> tuple[Tensor, Tensor]:
        return super().extend(site, **self._whole(site, known))

    def _whole(self, site: Any, known: Mapping[str, Any]) -> dict[str, Any]:
        """The matrices with zeros where nothing was kept."""
        whole = dict(known)
        for name, spec in self._pruned(site).items():
            values, places = whole.pop(f"{INNER}{name}.values"), whole.pop(f"{INNER}{name}.places")
            empty = values.new_zeros(torch.Size(spec.shape).numel())
            whole[INNER + name] = empty.scatter(0, places, values).reshape(spec.shape)
        return whole

    def fold(
        self, site: Any, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        inner = {name.removeprefix(INNER): tensor for name, tensor in self._whole(site, state).items()}
        return self.method.fold(site, weight, bias, inner)


def _like(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)


def _score(start: Tensor, gradient: Tensor) -> Tensor:
    """SNIP: how much the loss would change, to first order, if the entry were gone."""
    return start * gradient


def _probe_start(tensor: Tensor) -> Tensor:
    """What a matrix that starts at zero is judged by."""
    return torch.nn.init.normal_(tensor, std=0.02)
