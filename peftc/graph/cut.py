"""What is worth keeping of a graph's values for a backward pass, and what is computed again: a minimum cut.

Products with weights and attention are dear, unless their sums are short, and random numbers come only once: those
are kept. All else is computed again where that keeps fewer bytes. The cheapest choice is the minimum cut between what
is there and what is needed, each value weighing its bytes (as in min-cut rematerialisation, Chen et al. 2016 and
`torch._functorch.partitioners`; here the costs are those of running operation by operation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from math import inf
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

import peftc.kernels  # noqa: F401 - registers the operation that is named below
from peftc.graph.ir import Memory, is_tensor, memory
from peftc.kernels.island import Island

aten = torch.ops.aten


NOMINAL = 512  # a symbolic size, where bytes are compared


# Products as the captured graph spells them, before autograd takes them apart.
COMPOSITE = {aten.linear.default, aten.matmul.default, aten.conv1d.default, aten.conv2d.default}


# Products, and which operand's last size says how long the sums are.
INNER = {
    aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1,
    torch.ops.peftc.scaled_linear.default: 0,
}  # fmt: skip


SHORT = 24


SOURCE, SINK = "inputs", "backward"


def cheapest(
    nodes: Iterable[fx.Node],
    needed: set[fx.Node],
    weight: Callable[[fx.Node], float],
    again: Callable[[fx.Node], bool],
) -> set[fx.Node]:
    """Which of `nodes` to keep so that all that are `needed` can be had: the fewest bytes, computing least again.

    Args:
        nodes: in the graph's order, with all that they read; what reads nothing is an input.
        needed: what the backward pass reads.
        weight: bytes that keeping a node's value takes; inf where it cannot be kept.
        again: whether it can be computed again from what it reads.
    """
    if not needed:
        return set()
    ordered = list(nodes)
    place = {node: index for index, node in enumerate(ordered)}
    network = tuple(
        (weight(node), tuple(place[one] for one in node.all_input_nodes) if again(node) else None, node in needed)
        for node in ordered
    )
    return {ordered[index] for index in _cheapest(network)}


@lru_cache(maxsize=64)  # equal blocks ask the same
def _cheapest(network: tuple[tuple[float, tuple[int, ...] | None, bool], ...]) -> frozenset[int]:
    """Of values, each with its weight, the places of those that it can be computed of, and whether it is needed."""
    graph: nx.DiGraph[Any] = nx.DiGraph()
    for place, (weight, operands, needed) in enumerate(network):
        graph.add_edge((place, "in"), (place, "out"), **({} if weight == inf else {"capacity": weight}))
        if operands is None:
            graph.add_edge(SOURCE, (place, "in"))
        else:
            graph.add_edges_from(((operand, "out"), (place, "in")) for operand in operands)
        if needed:
            graph.add_edge((place, "out"), SINK)
    _, (_, near) = nx.minimum_cut(graph, SOURCE, SINK)  # of several, networkx finds the cut next to the sink
    return frozenset(place for place, side in near - {SINK} if side == "out" and (place, "in") not in near)


def weight_of(node: fx.Node, gratis: set[Memory]) -> float:
    """Bytes that keeping a value takes, of a view those of the whole tensor and one more: rather keep what it shows."""
    given = node.meta.get("val")
    if isinstance(given, torch.Tensor):
        shown = any(is_tensor(operand) and memory(operand) == memory(node) for operand in node.all_input_nodes)
        return shown + (0 if memory(node) in gratis else nominal(given.untyped_storage().nbytes()))
    return 1 if isinstance(given, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)) else inf


def nominal(size: Any) -> int:
    """A size with every symbol at its nominal value."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    return _nominal(size.node.expr)


@lru_cache(maxsize=4096)
def _nominal(expression: Any) -> int:
    return int(expression.subs(dict.fromkeys(expression.free_symbols, NOMINAL)))


def may_repeat(node: fx.Node) -> bool:
    """Whether `node` computes the same when it is computed again."""
    return repeatable(node.target)


def repeatable(operation: Any) -> bool:
    """Whether `operation` draws no random numbers."""
    return torch.Tag.nondeterministic_seeded not in getattr(operation, "tags", ())


def is_dear(node: fx.Node) -> bool:
    """Whether `node` multiplies matrices, attends, or is another library's and might."""
    return dear(node.target, fx.node.map_arg(node.args, lambda operand: operand.meta.get("val")))


def dear(operation: Any, args: Sequence[Any]) -> bool:
    """`is_dear` of an operation and what it is called with."""
    if isinstance(operation, Island):
        return True
    if not isinstance(operation, torch._ops.OpOverload):
        return False
    if operation in INNER:  # short sums cost as little as an activation: those of Kronecker factors, of a low rank
        inner = args[INNER[operation]].shape[-1]
        return not (isinstance(inner, int) and inner <= SHORT)
    multiplies = (
        operation.overloadpacket in flop_registry or operation in COMPOSITE or "scaled_dot_product" in operation.name()
    )
    return multiplies or operation.namespace not in ("aten", "prims", "peftc")
