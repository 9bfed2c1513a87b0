"""What is worth keeping of a graph's values for a backward pass, and what is computed again: a minimum cut.

Products with weights and attention are dear, unless their sums are short, and random numbers come only once: those
are kept. All else is computed again where that keeps fewer bytes. The cheapest choice is the minimum cut between what
is there and what is needed, each value weighing its bytes (as in min-cut rematerialisation, Chen et al. 2016 and
`torch._functorch.partitioners`; here the costs are those of running operation by operation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

import peftc.kernels  # noqa: F401 - registers the operation that is named below
from peftc.graph.ir import Memory, is_tensor, memory

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
    graph: nx.DiGraph[Any] = nx.DiGraph()
    for node in nodes:
        bytes_ = weight(node)
        graph.add_edge((node, "in"), (node, "out"), **({} if bytes_ == inf else {"capacity": bytes_}))
        if again(node):
            graph.add_edges_from(((operand, "out"), (node, "in")) for operand in node.all_input_nodes)
        else:
            graph.add_edge(SOURCE, (node, "in"))
        if node in needed:
            graph.add_edge((node, "out"), SINK)
    if not needed:
        return set()
    _, (_, near) = nx.minimum_cut(graph, SOURCE, SINK)  # of several, networkx finds the cut next to the sink
    return {node for node, side in near - {SINK} if side == "out" and (node, "in") not in near}


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
    expression = size.node.expr
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
    if not isinstance(operation, torch._ops.OpOverload):
        return False
    if operation in INNER:  # short sums cost as little as an activation: those of Kronecker factors, of a low rank
        inner = args[INNER[operation]].shape[-1]
        return not (isinstance(inner, int) and inner <= SHORT)
    multiplies = (
        operation.overloadpacket in flop_registry or operation in COMPOSITE or "scaled_dot_product" in operation.name()
    )
    return multiplies or operation.namespace not in ("aten", "prims", "peftc")
