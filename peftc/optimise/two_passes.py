"""What a training step keeps of a block, and what its backward pass computes again: one minimum cut of the graph.

A value that the backward pass needs is kept, or computed again from values that are, by the rule of
`peftc.graph.cut`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from peftc.graph.cut import cheapest, is_dear, may_repeat, weight_of
from peftc.graph.ir import is_tensor, memory
from peftc.optimise.joint import Joint

aten = torch.ops.aten
CHECKS = (aten._assert_scalar.default, aten._assert_async.msg)  # nothing reads what they return


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
    checks = [node for node in joint.graph.nodes if node.target in CHECKS and node not in behind]
    return Passes(_forward(joint, kept, checks), _backward(joint, kept, behind), tuple(kept))


def _behind(joint: Joint) -> set[fx.Node]:
    """What depends on the gradients that come in: the backward pass itself."""
    behind = set(joint.tangents)
    for node in joint.graph.nodes:
        if any(operand in behind for operand in node.all_input_nodes) and node.op != "output":
            behind.add(node)
    return behind


def _needed(joint: Joint, behind: set[fx.Node]) -> set[fx.Node]:
    """What the backward pass reads of the forward pass, on the way to a gradient that is wanted."""
    results = [node for node in joint.gradients if node is not None]
    readers = [operand for node in _ancestors(joint, results) if node in behind for operand in node.all_input_nodes]
    return {node for node in (*readers, *results) if node not in behind}


def _forward(joint: Joint, kept: list[fx.Node], checks: list[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {node: _placed(graph, node) for node in joint.inputs}
    results: list[fx.Node | int] = [*joint.outputs, *kept]
    for node in _ancestors(joint, [*results, *checks]):
        env[node] = _copied(graph, node, env)
    graph.output(tuple(env[node] if isinstance(node, fx.Node) else node for node in results))
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


def _ancestors(joint: Joint, results: Iterable[fx.Node | int]) -> Iterator[fx.Node]:
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
