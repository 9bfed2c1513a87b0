"""What combinators have in common: a method that is made of another one, stands where that one stands, and keeps its
state under `method.`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Any

from peftc.protocol import Tensor
from peftc.protocol.method import PLAIN, Here, Method, Stage, State
from peftc.protocol.site import Site
from peftc.protocol.stages import OPERANDS, PROJECTIONS

INNER = "method."


class Combinator(Method):
    """Base of a method made of another, its parameter `method`. Delegates whatever a combinator does not change."""

    method: Method
    site: type[Site] | UnionType = Site
    outermost = False  # whether it goes around other combinators; the others take a plain method

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        inner = self.method
        self.site, self.stage, self.identity = inner.site, inner.stage, inner.identity
        self.unmergeable, self.windowed = inner.unmergeable, inner.windowed

    @classmethod
    def check(cls) -> None:
        """What it stands for is the method inside, which is checked by itself."""

    @property
    def label(self) -> str:
        return f"{self.name}_{self.method.label}"

    def conflict(self) -> str | None:
        inner = self.method
        if isinstance(inner, Combinator) and not self.outermost:
            return f"{inner.name} is made of another method: " + (
                f"write {inner.name}({self.name}(…))" if inner.outermost else f"{self.name} takes a plain one"
            )
        if inner.stage is Stage.SEQUENCE:
            return f"{inner.name} changes the whole sequence, and {self.name} needs an output at one place"
        if inner.indivisible:
            return f"{inner.name} cannot be part of it: {inner.indivisible}"
        if inner.scheduled:
            return f"the schedule of {inner.name} needs its state to itself"
        if inner.data is not None and not self.outermost:
            return f"{inner.name} starts from data of its own"
        if (reason := inner.claims_weight()) and inner.prepares:
            return f"{inner.name} cannot be part of it: {reason}"
        return None

    def claims_weight(self) -> str | None:
        return self.method.claims_weight()

    def refuses(self, site: Any) -> str | None:
        return self.method.refuses(site)

    def state(self, site: Any) -> dict[str, State]:
        return {INNER + name: spec for name, spec in self.method.state(site).items()}

    def shared(self, sites: Sequence[Any]) -> dict[str, State]:
        return {INNER + name: spec for name, spec in self.method.shared(sites).items()}

    def shares(self, sites: Sequence[Any]) -> list[dict[str, State]]:
        return [{INNER + name: spec for name, spec in own.items()} for own in self.method.shares(sites)]

    def initialise(self, site: Any, weight: Tensor, state: dict[str, Tensor], here: Here = PLAIN) -> None:
        own = {name.removeprefix(INNER): tensor for name, tensor in state.items() if name.startswith(INNER)}
        self.method.initialise(site, weight, own, here)

    @property
    def consistency(self) -> float:
        return self.method.consistency

    def unmergeable_at(self, site: Any) -> str | None:
        return self.unmergeable or self.method.unmergeable_at(site)

    def adds_bias(self, site: Any) -> bool:
        return self.method.adds_bias(site)

    def rewrites_input(self, site: Any) -> bool:
        return self.method.rewrites_input(site)

    def rate(self, state: str) -> float:
        return self.method.rate(state.removeprefix(INNER))

    def asks(self, state: Iterable[str]) -> tuple[str, ...]:
        asked = self.method.asks(())
        return (*state, *(name for name in OPERANDS if name in asked))

    def asks_input(self, state: Iterable[str]) -> tuple[str, ...]:
        asked = self.method.asks_input(())
        return (*state, *(name for name in OPERANDS if name in asked))

    @property
    def attends_apart(self) -> bool:
        return self.method.attends_apart

    def takes_positions(self, site: Any) -> int:
        return self.method.takes_positions(site)

    def asks_extend(self, state: Iterable[str]) -> tuple[str, ...]:
        asked = self.method.asks_extend(())
        return (*state, *(name for name in PROJECTIONS if name in asked))

    def extend(self, site: Any, **known: Any) -> tuple[Tensor, Tensor]:
        return self.method.extend(site, **chosen(known, self.method.asks_extend(inside(known))))

    def inner_output(self, site: Any, x: Tensor, y: Tensor, known: Mapping[str, Any]) -> Tensor:
        """The inner method's rewrite, out of what is known to the combinator: its own state and other operands."""
        changed: Tensor = self.method.rewrite(site, x, y, **chosen(known, self.method.asks(inside(known))))
        return changed

    def inner_input(self, site: Any, x: Tensor, known: Mapping[str, Any]) -> Tensor:
        """The inner method's rewrite of the input."""
        return self.method.rewrite_input(site, x, **chosen(known, self.method.asks_input(inside(known))))


def inside(names: Iterable[str]) -> tuple[str, ...]:
    """The inner method's own names of its state."""
    return tuple(name.removeprefix(INNER) for name in names if name.startswith(INNER))


def chosen(known: Mapping[str, Any], asked: Iterable[str]) -> dict[str, Any]:
    """What an inner method asks for: its state by its own names, and what else there is."""
    beside = (*OPERANDS, *PROJECTIONS)
    return {name: known.get(name if name in beside else INNER + name) for name in asked}
