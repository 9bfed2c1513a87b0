"""Walks over the value flow of a captured graph (networkx), and the attention patterns found on it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import networkx as nx
import torch
from torch import fx

from peftc.graph.ir import is_tensor, value
from peftc.graph.rows import path_between
from peftc.protocol.site import AttentionPattern, Use

aten = torch.ops.aten

ACTIVATIONS = {
    getattr(aten, name).default
    for name in (
        "relu", "gelu", "silu", "tanh", "sigmoid", "erf", "hardtanh", "hardswish", "leaky_relu", "mish",
        "softplus", "elu", "expm1", "relu6", "hardsigmoid", "selu", "celu", "log_sigmoid",
    )
}  # fmt: skip
SOFTMAXES = {aten.softmax.int, aten._softmax.default}
SCORES: dict[Any, tuple[int, int]] = {
    aten.matmul.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
}
# What may stand between a softmax and its product with the values.
PASSIVE = {
    aten.dropout.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default,
    aten.view.default, aten.reshape.default, aten.expand.default, aten.contiguous.default, aten.mul.Tensor,
    aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.transpose.int, aten.alias.default,
    aten.slice.Tensor,
}  # fmt: skip


def value_flow(graph: fx.Graph) -> nx.DiGraph[fx.Node]:
    """Nodes in the graph's order, an edge from every feature value to each node that reads it.

    Through sizes, masks and indices, such as a router's choices, no features flow.
    """
    flow: nx.DiGraph[fx.Node] = nx.DiGraph()
    for node in graph.nodes:
        flow.add_node(node)
        flow.add_edges_from((argument, node) for argument in node.all_input_nodes if _has_features(argument))
    return flow


def _has_features(node: fx.Node) -> bool:
    found = node.meta.get("val")
    if isinstance(found, torch.Tensor):
        return found.is_floating_point() or found.is_complex()
    return isinstance(found, tuple | list)


def nearest(
    start: fx.Node,
    neighbours: Callable[[fx.Node], Iterator[fx.Node]],
    stop: Callable[[fx.Node], bool],
) -> Iterator[fx.Node]:
    """Breadth-first from `start`, not past a node where `stop` holds; yields those, nearest first."""
    queue, seen = deque([start]), {start}
    while queue:
        node = queue.popleft()
        if stop(node):
            yield node
            continue
        for other in neighbours(node):
            if other not in seen:
                seen.add(other)
                queue.append(other)


def attentions(
    graph: fx.Graph, flow: nx.DiGraph[fx.Node], reads_same: Callable[[fx.Node, fx.Node], bool]
) -> Iterator[AttentionPattern]:
    """Every attention of the graph: the fused operation, or softmax(q kᵀ) v spelt out.

    `reads_same(k, v)` says whether two operands are projections of one value; it tells the scores' own product
    from those of relative positions, which are added to it.
    """
    for node in graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            q, k, v = node.args[:3]
            yield AttentionPattern(q, k, v, node)
        elif node.target in SOFTMAXES:
            found = _spelt_out(node, flow, reads_same)
            if found:
                yield found


def _spelt_out(
    softmax: fx.Node, flow: nx.DiGraph[fx.Node], reads_same: Callable[[fx.Node, fx.Node], bool]
) -> AttentionPattern | None:
    out = _times_values(softmax)
    if out is None or not isinstance(v := out.args[1], fx.Node):
        return None

    products = nearest(softmax, flow.predecessors, lambda node: _factors(node) is not None)
    found = [(pair, node) for node in products if (pair := _factors(node))]
    for (q, k), scores in found:
        if reads_same(k, v):
            return AttentionPattern(q, k, v, out, scores, softmax)
    return AttentionPattern(*found[0][0], v, out, found[0][1], softmax) if found else None


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two factors of a product of computed values."""
    if node.target not in SCORES:
        return None
    left, right = (node.args[index] for index in SCORES[node.target])
    return (left, right) if isinstance(left, fx.Node) and isinstance(right, fx.Node) else None


def _times_values(softmax: fx.Node) -> fx.Node | None:
    """The product that takes the softmax's result as its left operand."""
    node, seen = softmax, 0
    while seen < 12:
        for user in node.users:
            if user.target in SCORES and user.args[SCORES[user.target][0]] is node:
                return user
        passive = [user for user in node.users if user.target in PASSIVE]
        if len(passive) != 1:
            return None
        node, seen = passive[0], seen + 1
    return None


def before_routing(flow: nx.DiGraph[fx.Node], entry: Use, h: fx.Node) -> Use:
    """Where a mixture of experts is entered by as many tokens as leave it in `h`.

    What an expert itself reads is sorted by expert, or repeated for each; `entry` where no such place is found.
    """
    size = str(value(h).numel())  # as text, so that comparing adds no guard
    queue, seen = deque([(entry.x, entry.op)]), {entry.x}
    while queue:
        node, reader = queue.popleft()
        if is_tensor(node) and str(value(node).numel()) == size and node in reader.args:
            return Use(reader, entry.y, reader.args.index(node))
        for other in flow.predecessors(node):
            if other not in seen:
                seen.add(other)
                queue.append((other, node))
    return entry


def residual_value(start: fx.Node) -> fx.Node:
    """The node just before `start`'s value joins the residual stream; `start` itself where it never does.

    The residual add is the first sum of something that depends on `start` with a computed value that does not. Features
    stand last in what is returned: where an image's channels are moved to the front, it is what stands before that.
    """
    reached = {start}
    node = start.next
    while node.op != "root":
        inputs = [argument for argument in node.all_input_nodes if is_tensor(argument)]
        inside = [argument for argument in inputs if argument in reached]
        if inside:
            outside = [argument for argument in inputs if argument not in reached and argument.op != "get_attr"]
            if node.target is aten.add.Tensor and outside:
                moves = filter(_moves_features, path_between(start, inside[0]))
                return next((other.all_input_nodes[0] for other in moves), inside[0])
            reached.add(node)
        node = node.next
    return start


def _moves_features(node: fx.Node) -> bool:
    """Whether the last dimension of the operand does not stay the last."""
    count = value(node).dim() if is_tensor(node) else 0
    match node.target, node.args:
        case aten.permute.default, (_, list(order)):
            return int(order[-1]) % count != count - 1
        case aten.transpose.int, (_, int(one), int(other)):
            return one % count != other % count and count - 1 in (one % count, other % count)
    return False
