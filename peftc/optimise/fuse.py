"""Fusing: each rule looks for its pattern all over a graph, and rewrites what it finds.

`peftc.protocol.rule` says what a rule is. What is told of each is how often it fired, or how near it came.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import fx

import peftc.kernels  # noqa: F401 - registers the operations that rules emit
from peftc.diagnostics import debug
from peftc.graph.ir import is_mutable, module_path
from peftc.graph.patterns import Match, Miss
from peftc.protocol.rule import Editor, Fusion, fusion, fusions

__all__ = ["Editor", "Fired", "Fusion", "Match", "Miss", "NearMiss", "fuse", "fusion", "fusions"]


@dataclass(frozen=True)
class Fired:
    """How often a rule fired, how many places that rewrote, and, where it never did, how near it came.

    `telling`: the graph has what the rule is for, so that a near miss is worth a look.
    """

    rule: str
    count: int
    places: int
    nearest: NearMiss | None
    telling: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        miss = None if self.nearest is None else asdict(self.nearest)
        return {
            "rule": self.rule,
            "fired": self.count,
            "places": self.places,
            "nearest_miss": miss,
            "telling": self.telling,
        }

    @property
    def missed(self) -> str:
        """Where a rule that never fired came nearest, and what stood in the way."""
        return str(self.nearest or "nothing like it in the graph")

    def __str__(self) -> str:
        if self.count:
            places = "" if self.places == self.count else f" at {self.places} places"
            return f"{self.rule}: {self.count} times{places}"
        return f"{self.rule}: never; {'nearest ' if self.nearest else ''}{self.missed}"


def fuse(
    module: fx.GraphModule, graph: fx.Graph, blocks: Sequence[str] = (), rules: Sequence[Fusion] | None = None
) -> tuple[Fired, ...]:
    """Applies each rule wherever it fits, in place. Fake values of new nodes are computed from their inputs'.

    Without `rules`, all but those for the graph of a training step alone.
    """
    editor = Editor(module, graph, blocks)
    if rules is None:
        rules = [rule for rule in fusions() if not rule.in_training]
    fired: list[Fired] = []
    words = _Words.of(graph)
    for rule in rules:
        fired.append(_apply(rule, editor, words))
        if fired[-1].places:
            words = _Words.of(graph)
    return tuple(fired)


@dataclass(frozen=True)
class _Words:
    """The operations of a graph, and their names; and those of its tensors."""

    operations: frozenset[Any]
    names: frozenset[str]

    @classmethod
    def of(cls, graph: fx.Graph) -> _Words:
        tensors = {str(node.target) for node in graph.find_nodes(op="get_attr")}
        targets = {id(node.target): node.target for node in graph.nodes if node.op == "call_function"}
        names = {str(target) for target in targets.values()}
        return cls(frozenset({*targets.values(), *names}), frozenset(tensors | names))

    def may_have(self, rule: Fusion) -> bool:
        """Whether there is an operation for each place of the rule's pattern."""
        return all(not self.operations.isdisjoint(needed) for needed in rule.pattern.needed)

    def say(self, words: Sequence[str]) -> bool:
        """Whether one of `words` is in the name of a tensor or an operation."""
        return any(word in name for word in words for name in self.names)


def _apply(rule: Fusion, editor: Editor, words: _Words) -> Fired:
    """One rule: first every match, from the end of the graph so that the largest one wins, then the rewriting."""
    sought = words.say(rule.sought)
    if not (sought or words.may_have(rule)):
        return Fired(rule.name, 0, 0, None)
    groups: dict[Hashable, list[Match]] = defaultdict(list)
    misses: list[Miss] = []
    for found in _found(rule, editor):
        if isinstance(found, Match):
            groups[rule.group(found, editor)].insert(0, found)
        else:
            misses.append(found)
            debug.tell(5, (f"fusion {rule.name} not in {_in_words(miss)}" for miss in [found]))
    for found_together in reversed(groups.values()):
        matches = [editor.current(match) for match in found_together]
        written = rule.rewrite(matches, editor)
        if len(written) != len(matches):
            raise TypeError(f"{type(rule).__name__}.rewrite gives {len(written)} nodes for {len(matches)} places")
        for match, new in zip(matches, written, strict=True):
            editor.replace(match, new)
    if groups or not misses:
        return Fired(rule.name, len(groups), sum(map(len, groups.values())), None)
    best = max(misses, key=lambda miss: (miss.refused, miss.depth))
    return Fired(rule.name, 0, 0, _in_words(best), telling=sought or (best.refused and not rule.sought))


def _found(rule: Fusion, editor: Editor) -> Iterator[Match | Miss]:
    """Each place that fits, and each where half of the pattern does, the operation at its root not alone."""
    taken: set[fx.Node] = set()
    written = {node: writer for writer in editor.graph.nodes if is_mutable(writer) for node in _seen_through(writer)}
    begins: dict[int, bool] = {}  # whether the pattern may at an operation
    for node in reversed(editor.graph.nodes):
        if node.op != "call_function":
            continue
        if (may := begins.get(id(node.target))) is None:
            may = begins[id(node.target)] = rule.pattern.may_begin(node)
        if not may or node in taken:
            continue
        found = rule.pattern.match(node)
        if isinstance(found, Match):
            writer = written.get(node)
            overwritten = Miss(node, f"{writer.name} writes over it", (writer,)) if writer else None
            if (miss := overwritten or rule.check(found, editor)) is not None:
                found = replace(miss, refused=True)
        if isinstance(found, Match):
            taken.update(found.nodes)
            yield found
        elif found.refused or (found.depth > 1 and 2 * found.depth >= rule.pattern.size):
            yield found


def _seen_through(writer: fx.Node) -> Iterator[fx.Node]:
    """What an operation writes over: its first operand, and each value that this is a view of."""
    node = writer.args[0]
    while isinstance(node, fx.Node):
        yield node
        returns = getattr(getattr(node.target, "_schema", None), "returns", ())
        node = node.args[0] if node.args and any(value.alias_info is not None for value in returns) else None


def _in_words(miss: Miss) -> NearMiss:
    return NearMiss(miss.root.name, module_path(miss.root), miss.reason, tuple(node.name for node in miss.culprits))


@dataclass(frozen=True)
class NearMiss:
    """The place where most of a pattern fitted, in words: `at` a node, `within` a module, and the nodes in the way."""

    at: str
    within: str
    reason: str
    nodes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.within}: {self.reason}" if self.within else self.reason
