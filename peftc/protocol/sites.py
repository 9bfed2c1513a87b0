"""All the sites of a model; and the registry of kinds of site that are found by a file of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, TypeVar

from peftc.protocol import fx
from peftc.protocol.params import demand, import_all
from peftc.protocol.site import Sequence, Site

S = TypeVar("S", bound=type[Site])
_kinds: dict[str, type[Site]] = {}


def site(cls: S) -> S:
    """Registers a kind of site under its `kind`.

    Raises:
        TypeError: where the class lacks what every kind has.
        ValueError: where its name is taken.
    """
    demand(
        cls, Site, kind="its name among the kinds", own_roles="the words by which a spec names it",
        noun="it says in words what one of it is", nouns="it says in words what several are",
        written="it says what a spec writes for it", find="it finds the places in a graph",
        reads="it says which values of the graph a method there is given",
        changes="it says which values of the graph become others where a method acts",
    )  # fmt: skip
    if "__dataclass_params__" not in vars(cls):
        raise TypeError(f"{cls.__name__} lacks @dataclass(frozen=True, eq=False, repr=False) under @site")
    if cls.kind in _kinds:
        raise ValueError(f"two kinds of site are called {cls.kind}")
    _kinds[cls.kind] = cls
    return cls


@cache
def site_kinds() -> tuple[type[Site], ...]:
    """Every kind with a file under `passes/sites`, by name: importing each file registers what it defines."""
    import_all("sites")
    return tuple(cls for _, cls in sorted(_kinds.items()))


@dataclass(frozen=True, slots=True)
class Absence:
    """A role that nothing has in the sublayer or linear layer `name`, as the search for it ended elsewhere.

    It was stopped by `operation` in the module `module`, at `line` of its code; `residual`: by the residual stream. A
    linear layer that no search came to has no `role`: it says where its own result goes, be it another linear layer.
    """

    role: str
    name: str
    operation: str
    module: str = ""
    line: str = ""
    residual: bool = False

    @property
    def reason(self) -> str:
        """In words."""
        place = " of ".join(filter(None, (f"`{self.operation}`", self.module))) + (
            f" ({self.line})" if self.line else ""
        )
        stop = f"the residual stream, {place}" if self.residual else place
        return f"the search for {self.role} stopped at {stop}" if self.role else f"its result goes to {stop}"

    def to_json(self) -> dict[str, Any]:
        """All fields, and the reason."""
        return {**asdict(self), "reason": self.reason}


@dataclass(frozen=True)
class Sites:
    """Everything a model offers to selectors, in the order of the forward pass; and beside it its sequences."""

    model: str
    items: tuple[Site, ...]
    parameters: dict[str, int] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    sequences: tuple[Sequence, ...] = ()
    absent: tuple[Absence, ...] = ()

    def __iter__(self) -> Iterator[Site]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def roles(self) -> list[str]:
        """Every role some site has, sorted."""
        return sorted({role for site in self.items for role in site.roles})

    def to_json(self) -> list[dict[str, Any]]:
        """One object a site: name, kind, roles, layer, stack, parameters, and the site's own numbers."""
        return [
            {
                "name": site.name,
                "kind": site.kind,
                "roles": sorted(site.roles),
                "layer": site.layer,
                "stack": site.stack,
                "parameters": list(site.parameters),
                **site.facts(),
            }
            for site in self.items
        ]


def further(module: fx.GraphModule, taken: set[str], names: Mapping[str, list[str]]) -> Iterator[Site]:
    """What the kinds of site find that have a file of their own.

    Raises:
        ValueError: where a site has the name of another, or no word of its kind.
    """
    for kind in site_kinds():
        for site in kind.find(module, names):
            if site.name in taken:
                raise ValueError(f"{kind.__name__}.find calls a site {site.name!r}, as another is called")
            if site.roles.isdisjoint(kind.own_roles):
                raise ValueError(f"{kind.__name__}.find gives {site.name} no role of {', '.join(kind.own_roles)}")
            taken.add(site.name)
            yield site
