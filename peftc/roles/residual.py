"""Graph -> block sites: the hidden state that enters each block and the one that leaves it, by data flow.

What leaves a block is the last tensor that it computes for others. What enters it is reached from there without
crossing a product: along the residual stream, the only way through a block on which nothing is multiplied by weights.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import cast

import networkx as nx
import torch
from torch import fx

from peftc.graph.ir import block_of, call_of, is_tensor, value
from peftc.protocol.site import AttentionPattern, Block, Reading
from peftc.roles import stacks as found
from peftc.roles.flow import SCORES, nearest
from peftc.roles.parameters import CONVOLUTIONS

aten = torch.ops.aten

# What has features in its last dimension, and in the one behind the batch.
LAST = {aten.layer_norm.default, aten.rms_norm.default, aten.embedding.default}
CHANNELS = CONVOLUTIONS | {aten.batch_norm.default, aten.group_norm.default, aten.instance_norm.default}

Members = dict[str, list[fx.Node]]
Crossing = dict[str, tuple[AttentionPattern, fx.Node]]


def block_sites(
    graph: fx.Graph,
    flow: nx.DiGraph[fx.Node],
    blocks: list[found.BlockPath],
    is_product: Callable[[fx.Node], bool],
    crossing: Crossing,
) -> list[Block]:
    """One site a block, in module order.

    Args:
        graph: a captured model.
        flow: its values and who reads them.
        blocks: the paths of its blocks.
        is_product: whether a node multiplies by a weight.
        crossing: of each block with cross attention, that and the value which its keys are made of.
    """
    members = _members(graph, blocks)
    leaving = {path: h for path, nodes in members.items() if (h := _leaving(nodes)) is not None}
    tops = {stack: list(group)[-1] for stack, group in groupby(blocks, lambda block: block.stack)}
    ends = {h: stack for stack, block in tops.items() if (h := leaving.get(block.path)) is not None}
    readers = {stack: _readers(flow, h, stack, blocks, members) for h, stack in ends.items()}
    used = [str(node.target) for node in graph.find_nodes(op="get_attr")]

    def site(block: found.BlockPath) -> Block:
        h = leaving.get(block.path)
        h = h if h is not None and _has_features_last(flow, h, is_product) else None
        x = None if h is None else _entering(flow, h, set(members[block.path]), is_product)
        reading, source = _reading(flow, block, crossing, ends)
        return Block(
            block.path, block.path, frozenset({"block"}),
            parameters=tuple(name for name in used if name.startswith(f"{block.path}.")),
            width=0 if h is None or x is None else int(value(h).shape[-1]),
            x=x, h=None if x is None else h, top=block is tops[block.stack],
            repeated=len({call_of(node, block.path) for node in members[block.path]}) > 1,
            readers=readers.get(block.stack, ()), reading=reading, source=source,
        )  # fmt: skip

    return [site(block) for block in blocks]


def _members(graph: fx.Graph, blocks: list[found.BlockPath]) -> Members:
    """The nodes of each block, in order."""
    paths = {block.path for block in blocks}
    members: Members = defaultdict(list)
    for node in graph.nodes:
        if (path := block_of(node, paths)) is not None:
            members[path].append(node)
    return members


def _leaving(nodes: list[fx.Node]) -> fx.Node | None:
    """The last of a block's tensors that something outside the block reads."""
    inside = set(nodes)
    for node in reversed(nodes):
        if is_tensor(node) and value(node).is_floating_point() and any(user not in inside for user in node.users):
            return node
    return None


def _has_features_last(flow: nx.DiGraph[fx.Node], h: fx.Node, is_product: Callable[[fx.Node], bool]) -> bool:
    """Whether the features of a value are its last dimension, and not an image's channels in front of its grid."""
    last = value(h).dim() - 1
    queue, seen = deque([(h, last)]), {h}  # and the dimension that is the last one of h
    while queue:
        node, dim = queue.popleft()
        if is_product(node) or node.target in LAST:
            return dim == value(node).dim() - 1
        if node.target in CHANNELS:
            return dim == 1
        for other in flow.predecessors(node):
            if other not in seen and other.op != "get_attr" and is_tensor(other) and value(other).dim() == last + 1:
                seen.add(other)
                queue.append((other, _dim_before(node, dim)))
    return True


def _dim_before(node: fx.Node, dim: int) -> int:
    """Which dimension of the operand is `dim` of what `node` makes of it, in another order or not."""
    count = value(node).dim()
    if node.target is aten.permute.default:
        return int(cast(Sequence[int], node.args[1])[dim]) % count
    if node.target is aten.transpose.int:
        one, other = (cast(int, place) % count for place in node.args[1:])
        return {one: other, other: one}.get(dim, dim)
    return dim


def _entering(
    flow: nx.DiGraph[fx.Node], h: fx.Node, inside: set[fx.Node], is_product: Callable[[fx.Node], bool]
) -> fx.Node | None:
    """The value of h's own shape, made outside the block, that reaches `h` with no product on the way."""

    def stop(node: fx.Node) -> bool:
        return node not in inside or is_product(node) or node.target in SCORES

    for node in nearest(h, flow.predecessors, stop):
        if node not in inside and node.op != "get_attr" and is_tensor(node) and value(node).shape == value(h).shape:
            return node
    return None


def _readers(
    flow: nx.DiGraph[fx.Node], h: fx.Node, stack: str, blocks: list[found.BlockPath], members: Members
) -> tuple[str, ...]:
    """The other containers with a block that depends on `h`."""
    behind = nx.descendants(flow, h)
    others = {block.stack for block in blocks if not behind.isdisjoint(members.get(block.path, ()))}
    return tuple(sorted(others - {stack}))


def _reading(
    flow: nx.DiGraph[fx.Node], block: found.BlockPath, crossing: Crossing, ends: dict[fx.Node, str]
) -> tuple[Reading | None, str | None]:
    """The block's cross attention and the container that it reads; nothing where its heads stand in the batch."""
    if block.path not in crossing:
        return None, None
    attention, read = crossing[block.path]
    source = next((ends[node] for node in nearest(read, flow.predecessors, ends.__contains__)), None)
    if source is None or value(attention.v).dim() != 4:
        return None, source
    return Reading(attention.out, 1 if attention.out.target in SCORES else 2), source
