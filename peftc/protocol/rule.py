"""What a fusion is: one class that says which operations belong together and what computes them at once.

A file under `passes/fusions` is one rule: `pattern` says what it looks for, `check` why a place that fits is left
alone, `rewrite` what stands there instead. Which values are read where decides, never a module's name. The graph
without fusions (`fuse=False`) is each rule's oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import fx

import peftc.kernels  # noqa: F401 - registers the operations that rules emit
from peftc.graph.ir import PROVENANCE, STACK, Provenance, block_of, compute, get_attribute, is_mutable, module_path
from peftc.graph.patterns import Match, Miss, Pattern, read_elsewhere
from peftc.protocol.params import demand, import_all

__all__ = ["Editor", "Fusion", "Match", "Miss", "fusion", "fusions"]


PASS = "fusions"


class Fusion:
    """Base of every rule. A subclass, under `@fusion`, gives a `name`, a `pattern` and `rewrite`.

    `pattern` is an expression of `peftc.graph.patterns`, whose names are how `rewrite` gets at what was found: nodes of
    the graph, with their fake value in `meta["val"]`, and constants. It fits tensors of any shape and precision: what
    `rewrite` takes for granted of them a `where` or `check` has to ask.

    `rank` orders the rules, then their names: those of a lower rank run first, over the whole graph. What others look
    for stands low, at 0 a GELU that was spelt out; what looks for the results of others stands high, at 3 or 4.
    """

    name: ClassVar[str]
    rank: ClassVar[int] = 2
    pattern: ClassVar[Pattern]
    # Words in the names of tensors and operations, of which a graph has one where it has what the rule is for.
    sought: ClassVar[tuple[str, ...]] = ()
    in_training: ClassVar[bool] = False  # for the graph of a training step alone, see `peftc.optimise.loss_only`

    def check(self, match: Match, editor: Editor) -> Miss | None:
        """Why this place is not rewritten although the pattern fits, or None.

        Who defines it ends on `read_elsewhere(match)`: an inner value that others read is computed for them anyway.
        """
        return read_elsewhere(match)

    def group(self, match: Match, editor: Editor) -> Hashable:
        """Places with equal answers are rewritten together; each by itself unless a rule says otherwise."""
        return match.root

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> Sequence[fx.Node]:
        """Emits what computes the roots of `matches`, which stand in the graph's order; one node for each.

        There is one match unless `group` says otherwise. `editor.emit(match, match.root, operation, …)` writes a node
        in front of the root, where all that the match named is known. The nodes returned have the roots' shape and
        dtype, and a backward pass; what is done with them, and with the nodes that they replace, is the caller's.
        """
        raise NotImplementedError


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
        return block_of(node, self.blocks)

    def stamp(self, match: Match) -> Provenance:
        """Provenance of what replaces `match`: the site and the statement of what it replaces, if it has any."""
        for node in match.nodes:
            if isinstance(known := node.meta.get(PROVENANCE), Provenance):
                return Provenance(PASS, known.site, known.span)
        return Provenance(PASS, module_path(match.root))

    def emit(self, match: Match, before: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node in front of `before`, in place of what `match` found. Behind `target` stand its arguments."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {PROVENANCE: self.stamp(match), STACK: match.root.meta.get(STACK)}
        compute(node)
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
        """Erases `node` unless something reads it, and what it alone read and that writes over nothing."""
        if not node.users and node.op == "call_function" and not node._erased:
            sources = node.all_input_nodes
            self.graph.erase_node(node)
            for source in sources:
                if not is_mutable(source):
                    self.drop(source)


F = TypeVar("F", bound=type[Fusion])


_registry: dict[str, type[Fusion]] = {}


def fusion(cls: F) -> F:
    """Registers a rule under its `name`.

    Raises:
        TypeError: where the class lacks what every rule has.
        ValueError: where its name is taken.
    """
    demand(
        cls, Fusion, name="the report of a compilation calls it by that", pattern="it says what the rule looks for",
        rewrite="it says what stands there instead",
    )  # fmt: skip
    if not isinstance(cls.pattern, Pattern) or not cls.pattern.size:
        raise TypeError(f"the pattern of {cls.__name__} is no operation, such as peftc.graph.patterns.op(…)")
    if cls.name in _registry:
        raise ValueError(f"two fusions are called {cls.name}")
    _registry[cls.name] = cls
    return cls


@cache
def fusions() -> tuple[Fusion, ...]:
    """Every rule, in the order they run: importing each file under `passes/fusions` registers what it defines."""
    import_all("fusions")
    return tuple(cls() for cls in sorted(_registry.values(), key=lambda cls: (cls.rank, cls.name)))
