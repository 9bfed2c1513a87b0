"""Flat graph -> one submodule a block, with parameter names as in the base model.

FSDP shards and checkpointing recomputes at module boundaries, and equal blocks are compiled once: a flat graph
has no boundaries. Each block's nodes move to a graph of their own, built on the block's own submodule.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from peftc.graph.ir import STACK, block_of, keep_unread
from peftc.graph.surroundings import uncollected


@dataclass
class _Run:
    """One block's nodes, in order, next to one another."""

    block: str
    nodes: list[fx.Node]


@uncollected()
def fold_blocks(
    module: fx.GraphModule, blocks: tuple[str, ...], kind: type[fx.GraphModule] = fx.GraphModule
) -> fx.Graph:
    """Replaces every block of `module` by a GraphModule, of that `kind`, in its place and returns the outer graph.

    A block whose nodes cannot stand together stays as it is: another block runs between them and needs them, as where
    blocks are called in the order 0, 1, 0.
    """
    pieces = _pieces(module.graph, blocks)
    outer = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    inside = {node: piece.block for piece in pieces if isinstance(piece, _Run) for node in piece.nodes}
    owned = {
        node: owner for node in module.graph.find_nodes(op="get_attr") if (owner := _owner(node, inside)) is not None
    }
    for node in module.graph.find_nodes(op="get_attr"):
        if node not in owned and not (node.target == "training" and all(u in inside for u in node.users)):
            env[node] = _copied(outer.node_copy(node), node)
    for piece in pieces:
        if isinstance(piece, _Run):
            _call_block(module, piece, outer, env, owned, kind)
        else:
            env[piece] = _copied(outer.node_copy(piece, env.__getitem__), piece)
    outer.lint()
    return outer


def _pieces(graph: fx.Graph, blocks: tuple[str, ...]) -> list[fx.Node | _Run]:
    """All nodes but `get_attr`, with the nodes of each block drawn together."""
    order = [node for node in graph.nodes if node.op != "get_attr"]
    owner = {node: block_of(node, frozenset(blocks)) for node in order}
    runs: dict[str, list[fx.Node]] = {}
    for block in blocks:
        members = {node for node in order if owner[node] == block}
        if not members:
            continue
        gathered, nodes = _gather(order, members)
        if all(owner[node] in (block, None) for node in nodes):
            order, runs[block] = gathered, nodes
    place = {node: index for index, node in enumerate(order)}
    starts: dict[fx.Node, _Run] = {}
    for block, nodes in runs.items():
        together = [place[node] for node in nodes]
        if together == list(range(together[0], together[0] + len(nodes))):
            starts[nodes[0]] = _Run(block, nodes)
    return list(_drawn_together(order, starts))


def _drawn_together(order: list[fx.Node], starts: dict[fx.Node, _Run]) -> Iterator[fx.Node | _Run]:
    skip: set[fx.Node] = set()
    for node in order:
        if node in starts:
            skip.update(starts[node].nodes)
            yield starts[node]
        elif node not in skip:
            yield node


def _gather(order: list[fx.Node], members: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Moves what does not depend on the members before them, the rest behind; what they need joins them."""
    places = [index for index, node in enumerate(order) if node in members]
    segment = order[places[0] : places[-1] + 1]
    after: set[fx.Node] = set()
    for node in segment:
        if node not in members and any(n in members or n in after for n in node.all_input_nodes):
            after.add(node)
    for node in reversed(segment):
        if node in after and any(user in members for user in node.users):
            after.remove(node)
            members.add(node)
    before = [node for node in segment if node not in members and node not in after]
    block = [node for node in segment if node in members]
    behind = [node for node in segment if node in after]
    return [*order[: places[0]], *before, *block, *behind, *order[places[-1] + 1 :]], block


def _owner(node: fx.Node, inside: dict[fx.Node, str]) -> str | None:
    """The block whose parameter this is and which alone reads it."""
    readers = {inside.get(user) for user in node.users}
    (only,) = readers if len(readers) == 1 else (None,)
    return only if only is not None and str(node.target).startswith(f"{only}.") else None


def _copied(new: fx.Node, old: fx.Node) -> fx.Node:
    new.meta = dict(old.meta)
    return new


def _call_block(
    module: fx.GraphModule,
    run: _Run,
    outer: fx.Graph,
    env: dict[fx.Node, fx.Node],
    owned: dict[fx.Node, str],
    kind: type[fx.GraphModule],
) -> None:
    """Builds the block's own module, puts it in its place, and calls it from `outer`."""
    inner = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    members = set(run.nodes)
    outside = dict.fromkeys(
        argument for node in run.nodes for argument in node.all_input_nodes if argument not in members
    )
    entering = [node for node in outside if owned.get(node) != run.block and node.target != "training"]
    for node in entering:
        known[node] = _copied(inner.placeholder(node.name), node)
    for node in outside:
        if node not in known:
            path = str(node.target).removeprefix(f"{run.block}.")
            known[node] = _copied(inner.get_attr(path), node)
    for node in run.nodes:
        known[node] = _copied(inner.node_copy(node, known.__getitem__), node)
    leaving = [node for node in run.nodes if any(user not in members for user in node.users)]
    inner.output(known[leaving[0]] if len(leaving) == 1 else tuple(known[node] for node in leaving))
    owner = module.get_submodule(run.block)
    folded = kind(owner, inner, class_name=_class_name(run))
    keep_unread(owner, folded)
    parent, _, leaf = run.block.rpartition(".")
    module.get_submodule(parent).add_module(leaf, folded)
    call = outer.call_module(run.block, tuple(env[node] for node in entering))
    call.meta[STACK] = run.nodes[0].meta.get(STACK)
    if len(leaving) == 1:
        call.meta["val"] = leaving[0].meta["val"]
        env[leaving[0]] = call
        return
    for index, node in enumerate(leaving):
        env[node] = outer.call_function(operator.getitem, (call, index))
        env[node].meta["val"] = node.meta["val"]


def _class_name(run: _Run) -> str:
    """The class of the block in the base model, so that tracebacks and `print(model)` read as one knows them."""
    for path, cls in run.nodes[0].meta[STACK].values():
        if str(path).partition("@")[0] == run.block:
            return str(cls).rpartition(".")[2]
    return "Block"
