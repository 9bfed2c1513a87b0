"""A graph that generates text, as a function of what is computed once of a model's tensors, and of its inputs.

The step for one token takes hundreds of tensors: looked up through the modules they lie in, that would cost as much as
a few blocks. And some of it is the same for every token, such as the scale of DoRA. So a
program has two parts: `prepare` runs once for a text, `run` for each of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from peftc.capture.convention import size_by_others
from peftc.graph.ir import copied, drop_unread, is_tensor, memory, value
from peftc.optimise.decoding.by_row import stacked_a, stacked_b
from peftc.optimise.decoding.packed import four
from peftc.roles.images import upstream

SIZE = torch.ops.aten.sym_size.int
AHEAD = (stacked_a, stacked_b, four)  # of what methods keep, and packed weights in another order

Code = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Program:
    """`run(*prepare(*tensors), *inputs)` gives `outputs`; all by their names, in order."""

    tensors: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    prepare: Code
    run: Code
    graph: fx.Graph


def cut(graph: fx.Graph, outputs: Mapping[str, fx.Node], given: Mapping[str, fx.Node]) -> fx.Graph:
    """A graph of its own, of what `outputs` are computed from; the values of `given` are inputs of those names."""
    new, known = copied(graph)
    new.output_node().args = (tuple(known[node] for node in outputs.values()),)
    inputs = new.find_nodes(op="placeholder")
    for name, node in given.items():
        with new.inserting_before(inputs[0]):
            made = new.placeholder(name)
        made.meta = dict(known[node].meta)
        known[node].replace_all_uses_with(made)
    drop_unread(new)
    inputs = new.find_nodes(op="placeholder")
    size_by_others(new, {node for node in inputs if all(user.target is SIZE for user in node.users)})
    drop_unread(new)
    for node in inputs:
        if not node.users:
            new.erase_node(node)
    return new


def program(root: nn.Module, graph: fx.Graph, outputs: Iterable[str]) -> Program:
    """The function that `graph`, which is used up, is over the tensors of `root`."""
    ahead = _ahead(graph)
    once, tensors = _once(ahead)
    inputs = graph.find_nodes(op="placeholder")
    first = next(iter(graph.nodes))
    for node in ahead:
        with graph.inserting_before(first):
            made = graph.placeholder(f"ahead_{node.name}")
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
    drop_unread(graph)
    names = tuple(str(node.target) for node in inputs)
    return Program(tensors, names, tuple(outputs), _function(root, once), _function(root, graph), graph)


def _once(ahead: list[fx.Node]) -> tuple[fx.Graph, tuple[str, ...]]:
    """A graph that computes `ahead`, with an input for each tensor, and the names of these."""
    behind = set().union(*map(upstream, ahead))
    once = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    members = [node for node in ahead[0].graph.nodes if node in behind] if ahead else []
    tensors = [node for node in members if node.op == "get_attr"]
    for node in tensors:
        known[node] = once.placeholder(f"tensor_{len(known)}")
    for node in members:
        if node not in known:
            known[node] = once.node_copy(node, known.__getitem__)
    once.output(tuple(known[node] for node in ahead))
    return once, tuple(str(node.target) for node in tensors)


def _ahead(graph: fx.Graph) -> list[fx.Node]:
    """What is computed once: of tensors alone, and smaller than they are, so that nothing packed lies unpacked."""
    below: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and is_tensor(node):
            below[node] = {node}
        elif _is_computed(node) and below.keys() >= set(node.all_input_nodes):
            below[node] = set().union(*(below[source] for source in node.all_input_nodes))
    wanted = [node for node in below if any(user not in below for user in node.users)]
    ahead: set[fx.Node] = set()
    for node in wanted:
        if node.op == "get_attr" or _is_small(node, below[node]):
            ahead.add(node)
        else:
            wanted += node.all_input_nodes
    return [node for node in graph.nodes if node in ahead]


def _is_small(node: fx.Node, sources: set[fx.Node]) -> bool:
    if node.target in AHEAD:
        return True
    if not is_tensor(node):
        return False
    if memory(node) in {memory(source) for source in sources}:
        return True
    largest = max(_bytes(source) for source in sources)
    return _bytes(node) <= max(largest / 16, 4096)


def _bytes(node: fx.Node) -> int:
    return value(node).numel() * value(node).element_size()


def _is_computed(node: fx.Node) -> bool:
    """Whether a node computes something of others, and the same each time."""
    draws = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.op == "call_function" and bool(node.all_input_nodes) and not draws


def _function(root: nn.Module, graph: fx.Graph) -> Code:
    module = fx.GraphModule(root, graph)
    code: Any = type(module).forward

    def run(*given: Any) -> tuple[Any, ...]:
        result: tuple[Any, ...] = code(module, *given)
        return result

    return run
