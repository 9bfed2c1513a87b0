"""Several copies of a method, of which each training step picks one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from peftc.protocol import Tensor, torch
from peftc.protocol.combinator import INNER, Combinator
from peftc.protocol.method import PLAIN, REQUIRED, Here, Init, Method, Stage, State, method, param


@method
class Mixture(Combinator):
    """In training one copy at random, at each site and each pass; else the average of their parameters.

    A step makes two passes, which pick for themselves, and a consistency loss draws their predictions together.
    """

    name = "mixture"
    formula = "f_i(y), i picked at random in training; f of the averaged parameters else"
    paper = "Wang et al. 2022 (AdaMix), arXiv:2205.12410"

    method: Method = param(REQUIRED, "what there are several of")
    n: int = param(4, "how many", min=2)
    consistency: float = param(
        1.0, "weight of the loss between two passes, the largest of a spec's; 0 makes it one pass", min=0
    )

    def conflict(self) -> str | None:
        inner = self.method
        if inner.stage is Stage.ATTENTION and inner.attends_apart:
            return f"{inner.name} acts twice in a pass, and each time another copy would be picked"
        return super().conflict()

    def refuses(self, site: Any) -> str | None:
        if reason := super().refuses(site):
            return reason
        whole = [
            name for name, spec in self.method.state(site).items() if spec.dtype and not spec.dtype.is_floating_point
        ]
        return f"{self.method.name} keeps places in '{whole[0]}', and places have no average" if whole else None

    def state(self, site: Any) -> dict[str, State]:
        return {
            name: State((self.n, *spec.shape), partial(_each, spec.init), spec.trainable, spec.dtype)
            for name, spec in super().state(site).items()
        }

    def initialise(self, site: Any, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> None:
        own = self.state(site)
        for copy in range(self.n):
            inner = {name.removeprefix(INNER): state[name][copy] if name in own else state[name] for name in state}
            self.method.initialise(site, weight, inner, here)

    def asks(self, state: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*super().asks(state), "training")))

    def asks_input(self, state: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*super().asks_input(state), "training")))

    def asks_extend(self, state: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*super().asks_extend(state), "training")))

    def extend(self, site: Any, **known: Any) -> tuple[Tensor, Tensor]:
        return super().extend(site, **self._picked(site, known))

    def rewrite(self, site: Any, x: Tensor, y: Tensor, **known: Tensor) -> Tensor:
        return self.inner_output(site, x, y, self._picked(site, known))

    def rewrite_input(self, site: Any, x: Tensor, **known: Tensor) -> Tensor:
        return self.inner_input(site, x, self._picked(site, known))

    def _picked(self, site: Any, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One copy in training, their mean else, as one weighted sum over the copies."""
        own = self.state(site)
        example = known[next(iter(own))]
        copies = torch.arange(self.n, device=example.device)
        one = (copies == torch.randint(self.n, (1,), device=example.device)).to(example.dtype)
        weights = torch.where(known["training"] > 0, one, 1 / self.n)
        return {name: torch.tensordot(weights, t, 1) if name in own else t for name, t in known.items()}

    def fold(
        self, site: Any, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        own = self.state(site)
        averaged = {name.removeprefix(INNER): t.mean(0) if name in own else t for name, t in state.items()}
        return self.method.fold(site, weight, bias, averaged)


def _each(init: Init, stacked: Tensor) -> Tensor:
    """Every copy starts by itself."""
    for copy in stacked:
        init(copy)
    return stacked
