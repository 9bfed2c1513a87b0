"""What a fusion is: one class that says which operations belong together and what computes them at once.

A file under `passes/fusions` is one rule: `pattern` says what it looks for, `check` why a place that fits is left
alone, `rewrite` what stands there instead. Which values are read where decides, never a module's name. The graph
without fusions (`fuse=False`) is each rule's oracle.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import fx

import peftc.kernels  # noqa: F401 - registers the operations that rules emit
from peftc.diagnostics import debug
from peftc.graph.ir import PROVENANCE, STACK, Provenance, computed, get_attribute, is_mutable, module_path
from peftc.graph.patterns import Match, Miss, Pattern, read_elsewhere

__all__ = ["Editor", "Fired", "Fusion", "Match", "Miss", "NearMiss", "fuse", "fusion", "fusions"]

PASS = "fusions"


class Fusion:
    """Base of every rule. `rank` orders them: those of a lower rank run first, over the whole graph."""

    name: ClassVar[str]
    rank: ClassVar[int] = 2
    pattern: ClassVar[Pattern]
    in_training: ClassVar[bool] = False  # for the graph of a training step alone, see `peftc.optimise.loss_only`

    def check(self, match: Match, editor: Editor) -> Miss | None:
        """Why this place is not rewritten although the pattern fits, or None."""
        return read_elsewhere(match)

    def group(self, match: Match, editor: Editor) -> Hashable:
        """Places with equal answers are rewritten together; each by itself unless a rule says otherwise."""
        return match.root

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> Sequence[fx.Node]:
        """Emits what computes the roots of `matches`, which stand in the graph's order; one node for each."""
        raise NotImplementedError


@dataclass(frozen=True)
class NearMiss:
    """The place where most of a pattern fitted, in words: `at` a node, `within` a module, and the nodes in the way."""

    at: str
    within: str
    reason: str
    nodes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.within}: {self.reason}" if self.within else self.reason


@dataclass(frozen=True)
class Fired:
    """How often a rule fired, how many places that rewrote, and, where it never did, how near it came."""

    rule: str
    count: int
    places: int
    nearest: NearMiss | None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        miss = None if self.nearest is None else asdict(self.nearest)
        return {"rule": self.rule, "fired": self.count, "places": self.places, "nearest_miss": miss}

    def __str__(self) -> str:
        if self.count:
            places = "" if self.places == self.count else f" at {self.places} places"
            return f"{self.rule}: {self.count} times{places}"
        return f"{self.rule}: never; " + (f"nearest {self.nearest}" if self.nearest else "nothing like it in the graph")


class Editor:
    """Writes one rule's nodes into a graph: with fake values, provenance and module stack."""

    def __init__(self, module: fx.GraphModule, graph: fx.Graph, blocks: Sequence[str] = ()) -> None:
        self.module = module
        self.graph = graph
        self.blocks = frozenset(blocks)
        self._replaced: dict[fx.Node, fx.Node] = {}
        self._learning: dict[fx.Node, bool] = {}
        for node in graph.nodes:
            self.learns(node)

    def learns(self, node: fx.Node) -> bool:
        """Whether the backward pass computes a gradient of `node`'s value."""
        if node not in self._learning:
            if node.op == "get_attr":
                found = get_attribute(self.module, str(node.target))
                self._learning[node] = isinstance(found, torch.Tensor) and found.requires_grad
            elif node.op == "call_module":
                self._learning[node] = True
            else:
                self._learning[node] = any(self.learns(source) for source in node.all_input_nodes)
        return self._learning[node]

    def block(self, node: fx.Node) -> str | None:
        """The block that `node` is computed in."""
        paths = [path for path, _ in (node.meta.get(STACK) or {}).values()]
        return next((path for path in reversed(paths) if path in self.blocks), None)

    def stamp(self, match: Match) -> Provenance:
        """Provenance of what replaces `match`: the site and the statement of what it replaces, if it has any."""
        for node in match.nodes:
            if isinstance(known := node.meta.get(PROVENANCE), Provenance):
                return Provenance(PASS, known.site, known.span)
        return Provenance(PASS, module_path(match.root))

    def emit(self, match: Match, before: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node in front of `before`, in place of what `match` found."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {PROVENANCE: self.stamp(match), STACK: match.root.meta.get(STACK)}
        node.meta["val"] = computed(node)
        return node

    def hoist(self, node: fx.Node, before: fx.Node) -> None:
        """Moves `node`, and what it needs, in front of `before`, where it stands behind it."""
        if node > before:
            for source in node.all_input_nodes:
                self.hoist(source, before)
            before.prepend(node)

    def current(self, match: Match) -> Match:
        """The match with what it named as the graph has it now: what is named may have been another's root."""
        return replace(match, named={name: self._replaced.get(found, found) for name, found in match.named.items()})

    def replace(self, match: Match, new: fx.Node) -> None:
        """Lets everything read `new` in place of the match's root, and drops what nothing reads any more."""
        match.root.replace_all_uses_with(new)
        self._replaced[match.root] = new
        for node in match.nodes:
            self.drop(node)

    def drop(self, node: fx.Node) -> None:
        """Erases `node` unless something reads it."""
        if not node.users and node.op == "call_function":
            self.graph.erase_node(node)


F = TypeVar("F", bound=type[Fusion])
_registry: dict[str, type[Fusion]] = {}


def fusion(cls: F) -> F:
    """Registers a rule under its `name`."""
    if cls.name in _registry:
        raise ValueError(f"two fusions are called {cls.name}")
    _registry[cls.name] = cls
    return cls


@cache
def fusions() -> tuple[Fusion, ...]:
    """Every rule, in the order they run: importing each file under `passes/fusions` registers what it defines."""
    package = importlib.import_module("peftc.passes.fusions")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return tuple(cls() for cls in sorted(_registry.values(), key=lambda cls: (cls.rank, cls.name)))


def fuse(
    module: fx.GraphModule, graph: fx.Graph, blocks: Sequence[str] = (), rules: Sequence[Fusion] | None = None
) -> tuple[Fired, ...]:
    """Applies each rule wherever it fits, in place. Fake values of new nodes are computed from their inputs'."""
    editor = Editor(module, graph, blocks)
    return tuple(_apply(rule, editor) for rule in rules or [rule for rule in fusions() if not rule.in_training])


def _apply(rule: Fusion, editor: Editor) -> Fired:
    """One rule: first every match, from the end of the graph so that the largest one wins, then the rewriting."""
    groups: dict[Hashable, list[Match]] = defaultdict(list)
    misses: list[Miss] = []
    for found in _found(rule, editor):
        if isinstance(found, Match):
            groups[rule.group(found, editor)].insert(0, found)
        else:
            misses.append(found)
            debug.tell_miss(rule.name, str(_in_words(found)))
    for found_together in reversed(groups.values()):
        matches = [editor.current(match) for match in found_together]
        for match, new in zip(matches, rule.rewrite(matches, editor), strict=True):
            editor.replace(match, new)
    nearest = None if groups or not misses else _in_words(max(misses, key=lambda miss: (miss.refused, miss.depth)))
    return Fired(rule.name, len(groups), sum(map(len, groups.values())), nearest)


def _found(rule: Fusion, editor: Editor) -> Iterator[Match | Miss]:
    """Each place that fits, and each where half of the pattern does, the operation at its root not alone."""
    taken: set[fx.Node] = set()
    written = {node: writer for writer in editor.graph.nodes if is_mutable(writer) for node in _seen_through(writer)}
    for node in reversed(editor.graph.nodes):
        if node.op != "call_function" or node in taken:
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
