"""Which operations are one box to a reader: a module spelt out in ATen, rotary positions, the arithmetic of positions.

Each function is given operations that are not yet one with others, and yields groups of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import networkx as nx
import torch
from torch import fx

from peftc.graph.ir import STACK, module_path
from peftc.graph.printing import short_name, stamp
from peftc.show.picture.scene import Scene

ROTARY, POSITIONS = "rotary", "position arithmetic"
# What turns a half of a head's numbers round, and puts halves together.
_TURNS = frozenset({"neg", "cat", "stack", "mul", "add", "sub"})


def spelt_out(nodes: Iterable[fx.Node], block: str | None) -> Iterator[list[fx.Node]]:
    """The original nodes of each module that has no module inside: a norm, an activation, a rotary embedding."""
    groups: dict[str, list[fx.Node]] = defaultdict(list)
    inner: set[str] = set()
    for node in nodes:
        if stack := node.meta.get(STACK):
            *outer, last = (path for path, _ in stack.values())
            inner.update(outer)
            if stamp(node) is None and node.op == "call_function":
                groups[last].append(node)
    yield from (nodes for path, nodes in groups.items() if path not in inner and path not in (block, ""))


def rotary(scene: Scene, nodes: Iterable[fx.Node]) -> Iterator[list[fx.Node]]:
    """Positions as rotations (Su et al. 2021, arXiv:2104.09864): x·cos + turned(x)·sin, for each x that is turned.

    Cosine and sine are known by what they are made of: of positions, of no weight, and of numbers that are no whole
    ones. What is between x and the sum is part of it, and what puts sums together again.
    """
    known = {node for node in nodes if node.op == "call_function" and stamp(node) is None}
    sums = [node for node in known if short_name(node) in ("add", "sub") and _is_turned(scene, node)]
    if not sums:
        return
    groups: nx.Graph[fx.Node] = nx.Graph()
    for end in sums:
        waiting, seen = [end], {end}
        while waiting:
            node = waiting.pop()
            groups.add_edge(end, node)
            for step in scene.flows(node):
                source = step.source
                if source in known and source not in seen and source in scene.content and _turns(scene, source):
                    seen.add(source)
                    waiting.append(source)
    for node in sorted(known, key=scene.order.__getitem__):  # halves that were turned one by one
        sources = [step.source for step in scene.flows(node)]
        if short_name(node) in ("cat", "stack") and sources and all(source in sums for source in sources):
            groups.add_edges_from((node, source) for source in sources)
    for group in nx.connected_components(groups):
        yield sorted(group, key=scene.order.__getitem__)


def _is_turned(scene: Scene, node: fx.Node) -> bool:
    """Whether both operands of a sum are products with something made of positions."""
    sources = [step.source for step in scene.flows(node)]
    return len(sources) == 2 and all(_by_positions(scene, source) for source in sources)


def _by_positions(scene: Scene, node: fx.Node) -> bool:
    if short_name(node) != "mul" or stamp(node) is not None:
        return False
    factors = [step.source for step in scene.flows(node)]
    made = [source for source in factors if source not in scene.content and _is_float(source)]
    return len(factors) == 2 and len(made) == 1


def _turns(scene: Scene, node: fx.Node) -> bool:
    name = short_name(node)
    return _by_positions(scene, node) if name == "mul" else name in _TURNS - {"add", "sub"}


def _is_float(node: fx.Node) -> bool:
    fake = node.meta.get("val")
    return isinstance(fake, torch.Tensor) and fake.is_floating_point()


def position_arithmetic(scene: Scene, nodes: Iterable[fx.Node]) -> Iterator[list[fx.Node]]:
    """What is computed of the places of tokens alone, of no weight and no input, as far as it hangs together."""
    known = {node for node in nodes if node.op == "call_function" and node not in scene.content and not stamp(node)}
    together: nx.Graph[fx.Node] = nx.Graph()
    together.add_nodes_from(known)
    for node in known:
        together.add_edges_from((node, step.source) for step in scene.flows(node) if step.source in known)
    for group in nx.connected_components(together):
        yield sorted(group, key=scene.order.__getitem__)


def integers(nodes: Iterable[fx.Node]) -> Iterator[list[fx.Node]]:
    """Positions and masks by the module that makes them."""
    groups: dict[str, list[fx.Node]] = defaultdict(list)
    for node in nodes:
        fake = node.meta.get("val")
        whole = isinstance(fake, torch.Tensor) and not fake.is_floating_point()
        if whole and node.op == "call_function" and stamp(node) is None:
            groups[module_path(node)].append(node)
    yield from groups.values()
