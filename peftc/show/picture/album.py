"""Every block of a model after every pass, and the whole of it: blocks that are alike share one drawing.

A drawing that is shared has marks where blocks differ: ⟦0⟧ for the path of its block, ⟦-1⟧ and ⟦+1⟧ for those of the
blocks before and behind it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import fx

from peftc.diagnostics.source import Span
from peftc.graph.printing import plain
from peftc.planning.plan import Plan
from peftc.protocol.site import Block, Site, Sublayer
from peftc.show.evidence import evidence
from peftc.show.picture.artist import draw_on
from peftc.show.picture.drawing import Drawing, DrawnEdge, origin_of
from peftc.show.picture.scene import Scene

Marked = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Look:
    """What one block is after one pass: the number of the drawing, and how many nodes of it are new."""

    drawing: int
    added: int


@dataclass(frozen=True)
class Place:
    """A site as a reader sees it: its roles, why it has them, and which statements reach it."""

    roles: tuple[str, ...]
    evidence: tuple[str, ...]
    statements: tuple[str, ...]


class Album:
    """The drawings of a plan's graphs. `history`: the flat graph after each pass, the captured one first."""

    def __init__(self, plan: Plan, history: Mapping[str, fx.Graph], *, detail: bool = False) -> None:
        self.plan, self.history, self.passes = plan, history, list(history)
        self.blocks = list(plan.sites.blocks)
        self.drawings: dict[Drawing, int] = {}
        self.looks: dict[str | None, list[Look]] = {}
        scenes: dict[tuple[int, bool], Scene] = {}
        self._stages: list[Scene] = []
        for index, graph in enumerate(history.values()):
            key = id(graph), index > 0
            if key not in scenes:
                scenes[key] = Scene(graph, plan, detail=detail, trained=index > 0)
            self._stages.append(scenes[key])
        for block in (None, *self.blocks):
            self.looks[block] = list(self._looks(block))

    def _looks(self, block: str | None) -> Iterator[Look]:
        marked = self.marked(block)
        drawn: dict[Scene, Drawing] = {}
        before: set[str] | None = None
        for scene in self._stages:
            if scene not in drawn:
                drawn[scene] = draw_on(scene, block)
            drawing = drawn[scene]
            shared = _shared(drawing, marked)
            if shared not in self.drawings:
                self.drawings[shared] = len(self.drawings)
            here = {node.id for node in drawing.nodes}
            yield Look(self.drawings[shared], len(here - before) if before is not None else 0)
            before = here

    def drawn(self, block: str | None, after: str) -> Drawing:
        """One block after one pass, without marks."""
        return draw_on(self._stages[self.passes.index(after)], block)

    def marked(self, block: str | None) -> Marked:
        """A function that puts marks into text where it names a block, its neighbours, or what is in them."""
        if block is None:
            return lambda text: text
        index = self.blocks.index(block)
        marks = {
            self.blocks[index + step]: f"⟦{step:+d}⟧" if step else "⟦0⟧"
            for step in (-1, 0, 1)
            if 0 <= index + step < len(self.blocks)
        }
        words = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, marks))})(?!\w)")
        return lambda text: words.sub(lambda found: marks[found[0]], text)

    @cached_property
    def idle(self) -> frozenset[str]:
        """The passes that change no drawing."""
        numbers = [[look.drawing for look in looks] for looks in self.looks.values()]
        return frozenset(
            name
            for index, name in enumerate(self.passes)
            if index and all(row[index] == row[index - 1] for row in numbers)
        )

    # Places

    @cached_property
    def _captured(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.history[self.passes[0]].nodes}

    @cached_property
    def _statements(self) -> dict[str, list[str]]:
        """By the names of sites, and of tensors, what reaches them."""
        found: dict[str, list[str]] = defaultdict(list)
        for name, span in reaching_spans(self.plan):
            origin = origin_of(span)
            found[name].append(f"{origin.place}: {origin.statement}")
        return found

    def places(self, block: str | None) -> dict[str, Place]:
        """The sites of a block, or those of no block and the blocks, by name; with marks."""
        marked = self.marked(block)
        sites = [site for site in self.plan.sites if site.block == block or (block is None and isinstance(site, Block))]
        return {marked(plain(site.name)): self._place(site, marked) for site in sites}

    def _place(self, site: Site, marked: Marked) -> Place:
        names = [site.name] if isinstance(site, Block | Sublayer) else [site.name, *site.parameters]
        statements = dict.fromkeys(line for name in names for line in self._statements.get(name, ()))
        lines = tuple(marked(plain(line)) for line in evidence(site, self.plan.sites, self._captured))
        return Place(tuple(sorted(site.roles)), lines, tuple(statements))


def reaching_spans(plan: Plan) -> list[tuple[str, Span]]:
    """The names of sites and of tensors, each with a statement that reaches it."""
    spans = [(binding.site.name, binding.span) for binding in plan.bindings]
    spans += [*plan.trained.items(), *((name, item.span) for name, item in plan.packed.items())]
    return spans + list(plan.recomputed.items())


def first_touched(plan: Plan) -> str | None:
    """The first block in which something is inserted or learns, else one with a packed weight, or that is recomputed.

    None where the spec leaves all of them as they are.
    """
    learning = [b.site.block or b.path for b in plan.bindings] + list(plan.trained)
    for names in (learning, list(plan.packed), list(plan.recomputed)):
        for block in plan.sites.blocks:
            if any(name == block or name.startswith(f"{block}.") for name in names):
                return block
    return None


def _shared(drawing: Drawing, marked: Marked) -> Drawing:
    """The drawing with marks in it, and with names of nodes that are the same in each block."""
    ids = {node.id: f"n{index}" for index, node in enumerate(drawing.nodes)}
    nodes = tuple(
        replace(
            node, id=ids[node.id], op=marked(node.op), name=marked(node.name), opens=marked(node.opens),
            notes=tuple(map(marked, node.notes)), reads=tuple(map(marked, node.reads)),
            sites=tuple(map(marked, node.sites)), python=tuple(map(marked, node.python)),
        )
        for node in drawing.nodes
    )  # fmt: skip
    edges = tuple(DrawnEdge(ids[e.source], ids[e.target], e.argument, e.through) for e in drawing.edges)
    return Drawing(marked(drawing.title), nodes, edges)
