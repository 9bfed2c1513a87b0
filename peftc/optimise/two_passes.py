"""What a training step keeps of a block, and what its backward pass computes again: one minimum cut of the graph.

A value that the backward pass needs is kept, or computed again from values that are. Products with weights and
attention are dear, unless their sums are short, and random numbers come only once: those are kept. All else, such as
norms, activations, casts and dequantised weights, is computed again where that keeps fewer bytes. The cheapest choice
is the minimum cut between the block's inputs and its backward pass, each value weighing its bytes (as in min-cut
rematerialisation, Chen et al. 2016 and `torch._functorch.partitioners`; here the costs are those of running operation
by operation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

import peftc.kernels  # noqa: F401 - registers the operation that is named below
from peftc.graph.ir import is_tensor, memory
from peftc.optimise.joint import Joint

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


@dataclass(frozen=True, eq=False)
class Passes:
    """The two graphs of a step.

    forward: inputs -> (*outputs, *kept). backward: (*kept, *tangents) -> a gradient, or None, for each input that needs
    one. `kept` are the values' nodes in the joint graph.
    """

    forward: fx.Graph
    backward: fx.Graph
    kept: tuple[fx.Node, ...]


def split(joint: Joint, free: Iterable[fx.Node], *, recompute_all: bool = False) -> Passes:
    """Cuts `joint` in two.

    Args:
        joint: both passes.
        free: inputs that are there anyway, such as weights: keeping them costs nothing.
        recompute_all: whether products, too, are computed again (a checkpoint): only the inputs are kept.
    """
    behind = _behind(joint)
    needed = _needed(joint, behind)
    order = {node: place for place, node in enumerate(joint.graph.nodes)}
    gratis = {memory(node) for node in free if is_tensor(node)}
    chosen = cheapest(
        (node for node in joint.graph.nodes if node not in behind and node.op != "output"),
        needed,
        lambda node: weight_of(node, gratis),
        lambda node: node.op != "placeholder" and may_repeat(node) and (recompute_all or not is_dear(node)),
    )
    kept = sorted(chosen, key=order.__getitem__)
    return Passes(_forward(joint, kept), _backward(joint, kept, behind), tuple(kept))


def _behind(joint: Joint) -> set[fx.Node]:
    """What depends on the gradients that come in: the backward pass itself."""
    behind = set(joint.tangents)
    for node in joint.graph.nodes:
        if any(operand in behind for operand in node.all_input_nodes) and node.op != "output":
            behind.add(node)
    return behind


def _needed(joint: Joint, behind: set[fx.Node]) -> set[fx.Node]:
    """What the backward pass reads of the forward pass."""
    readers = [operand for node in behind for operand in node.all_input_nodes]
    results = [node for node in joint.gradients if node is not None]
    return {node for node in (*readers, *results) if node not in behind}


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


def weight_of(node: fx.Node, gratis: set[int]) -> float:
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


def _forward(joint: Joint, kept: list[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {node: _placed(graph, node) for node in joint.inputs}
    results = [*joint.outputs, *kept]
    for node in _ancestors(joint, results):
        env[node] = _copied(graph, node, env)
    graph.output(tuple(env[node] for node in results))
    return graph


def _backward(joint: Joint, kept: list[fx.Node], behind: set[fx.Node]) -> fx.Graph:
    """Values are computed again where they are first read, so that no more of them are there at once than must."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {node: _placed(graph, node) for node in (*kept, *joint.tangents)}

    def place(node: fx.Node) -> None:
        waiting = [node]
        while waiting:
            last = waiting[-1]
            missing = [operand for operand in last.all_input_nodes if operand not in env]
            if missing:
                waiting += missing
                continue
            waiting.pop()
            if last not in env:
                env[last] = _copied(graph, last, env)

    results = [node for node in joint.gradients if node is not None]
    for node in _ancestors(joint, results):
        if node in behind:
            place(node)
    for node in results:
        place(node)
    graph.output(tuple(None if node is None else env[node] for node in joint.gradients))
    return graph


def _ancestors(joint: Joint, results: Iterable[fx.Node]) -> Iterator[fx.Node]:
    """The calls that `results` come from, themselves included, in the graph's order."""
    reached = set(results)
    for node in reversed(joint.graph.nodes):
        if node in reached:
            reached.update(node.all_input_nodes)
    return (node for node in joint.graph.nodes if node in reached and node.op == "call_function")


def _placed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    made = graph.placeholder(node.name)
    made.meta = dict(node.meta)
    return made


def _copied(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
    made = graph.node_copy(node, env.__getitem__)
    made.meta = {"val": node.meta.get("val")}
    return made
