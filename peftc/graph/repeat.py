"""What was traced once, written down for each of the equal blocks it stands for.

A graph has `BEGIN` and `END` around what a block of a kind computes, and `STANDS` in the place of each block that is
equal. `repeated` copies the one for the others, with their own parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from peftc.graph.ir import STACK, Memory, between, compute, is_mutable, is_tensor, memories, share

NUMBERED = re.compile(r"_\d+$")
ROOT = "L__self__"  # what torch.export calls the model where it says which module made a node

library = torch.library.Library("peftc", "FRAGMENT")
library.define("block_begins(int kind, str path, Tensor[] given) -> ()")
library.define("block_ends(int kind, Tensor[] made) -> ()")
library.define("block_stands(int kind, str path, Tensor[] given, Tensor[] like) -> Tensor[]")
BEGIN, END = torch.ops.peftc.block_begins.default, torch.ops.peftc.block_ends.default
STANDS = torch.ops.peftc.block_stands.default
for mark in (BEGIN, END):
    torch.library.impl(library, mark._schema.name.partition("::")[2], "CompositeExplicitAutograd")(lambda *_: None)
    fx.node.has_side_effect(mark)


@torch.library.impl(library, "block_stands", "CompositeExplicitAutograd")
def _stands(kind: int, path: str, given: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    return [torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=one.device) for one in like]


class NotAlikeError(Exception):
    """What was traced cannot be repeated: the block reads what it was not given, or what it has inside is read."""


@dataclass
class _Body:
    """What a block of a kind computes: the nodes between the marks."""

    path: str
    given: Sequence[fx.Node]
    made: Sequence[fx.Node]
    nodes: list[fx.Node]

    @cached_property
    def entering(self) -> set[Memory]:
        """The memory of what it was given or reads."""
        return {one for node in (*self.given, *self.reads.values()) for one in memories(node)}

    @cached_property
    def views(self) -> set[fx.Node]:
        """Its nodes that lie there."""
        return {node for node in self.nodes if not self.entering.isdisjoint(memories(node))}

    @cached_property
    def places(self) -> dict[fx.Node, str]:
        """What the memory of its other nodes is called, '' where it is that of the value."""
        named = {
            node: "".join(sorted({name for _, name in memories(node)})) for node in self.nodes if node not in self.views
        }
        return {node: f" {name}" if name else "" for node, name in named.items()}

    @cached_property
    def reads(self) -> dict[str, fx.Node]:
        """The tensors of the model that it reads, by name."""
        sources = (source for node in self.nodes for source in node.all_input_nodes if source.op == "get_attr")
        return {str(one.target): one for one in sources if one not in self.given and is_tensor(one)}

    def check(self) -> None:
        """Whether other blocks may have a copy.

        Raises:
            NotAlikeError: where they may not.
        """
        inside, given = {*self.nodes}, {*self.given}
        for node in self.nodes:
            for source in node.all_input_nodes:
                if source not in inside and source not in given and source.op != "get_attr" and memories(source):
                    raise NotAlikeError(f"{node.name} reads {source.name}")
            for user in node.users:
                if user not in inside and user.target is not END and node not in self.made and memories(node):
                    raise NotAlikeError(f"{user.name} reads {node.name}")
            if is_mutable(node) and any(not self.entering.isdisjoint(memories(one)) for one in node.all_input_nodes):
                raise NotAlikeError(f"{node.name} writes on what is not its own")
            if isinstance(node.target, HigherOrderOperator) or free_unbacked_symbols(node.meta.get("val", 0)):
                raise NotAlikeError(f"{node.name} has no fake value to be computed again")


def repeated(graph: fx.Graph, own: Mapping[str, Tensor]) -> tuple[fx.Graph, dict[str, str]]:
    """The whole graph, of which `graph` has equal blocks once; nodes are numbered in their order.

    Args:
        graph: captured; it stays as it is.
        own: the model's tensors by name.

    Returns:
        The graph; and of each attribute that a copy reads, the name of that which it was copied from.

    Raises:
        NotAlikeError: where a block cannot be copied.
    """
    copy = _Copy(graph, own, _bodies(graph))
    for node in graph.nodes:
        copy.write(node)
    return copy.graph, copy.origins


def is_marked(graph: fx.Graph) -> bool:
    """Whether something in it is only to be repeated."""
    return any(graph.find_nodes(op="call_function", target=mark) for mark in (BEGIN, END, STANDS))


def _bodies(graph: fx.Graph) -> dict[Any, _Body]:
    """What is between the marks, of each kind that something stands for."""
    starts, ends = (
        {node.args[0]: node for node in graph.find_nodes(op="call_function", target=mark)} for mark in (BEGIN, END)
    )
    bodies: dict[Any, _Body] = {}
    for kind in {node.args[0]: None for node in graph.find_nodes(op="call_function", target=STANDS)}:
        _, path, given = starts[kind].args
        bodies[kind] = _Body(path, given, ends[kind].args[1], [*between(starts[kind], ends[kind])])
        bodies[kind].check()
    return bodies


class _Copy:
    """Of a graph, into a new one.

    `known`: of each node, what it is there; `results`: of each node that stands for a block, what that returned;
    `moved`: the memory in which these were said to lie.
    """

    def __init__(self, old: fx.Graph, own: Mapping[str, Tensor], bodies: Mapping[Any, _Body]) -> None:
        self.own, self.bodies = own, bodies
        self.graph = fx.Graph()
        self.known: dict[fx.Node, fx.Node] = {}
        self.results: dict[fx.Node, list[fx.Node]] = {}
        self.moved: set[Memory] = set()
        self.named: dict[str, fx.Node] = {}
        self.place = {name: place for place, name in enumerate(own)}
        self.origins: dict[str, str] = {}
        self._attributes(old)

    def _attributes(self, old: fx.Graph) -> None:
        """What is read of the model, in its order; that of copies, too."""
        there = {str(node.target): node for node in old.find_nodes(op="get_attr")}
        for node in there.values():
            if not isinstance(node.meta.get("val"), Tensor | nn.Module):  # whether it is training
                self.known[node] = self._one(node, self.known)
        wanted = {name: node for name, node in there.items() if isinstance(node.meta.get("val"), Tensor)}
        for node in old.find_nodes(op="call_function", target=STANDS):
            body, path = self.bodies[node.args[0]], str(node.args[1])
            for name in body.reads:
                if (new := self._renamed(name, body, path)) not in wanted:
                    wanted[new], self.origins[new] = there[name], name
        for name in sorted(wanted, key=lambda name: self.place.get(name, len(self.place))):
            made = self.named[name] = self.graph.get_attr(name)
            made.meta = dict(wanted[name].meta)
            if name in self.origins:
                share(made, name)
            else:
                self.known[there[name]] = made

    def _renamed(self, name: str, body: _Body, path: str) -> str:
        """What a block at `path` has for what the one that was traced calls `name`; of a constant, one of its own."""
        new = path + name.removeprefix(body.path) if name.startswith(f"{body.path}.") else name
        return new if name not in self.own or self.own[new] is not self.own[name] else name

    def write(self, node: fx.Node) -> None:
        """Copies a node, and what it stands for."""
        if node in self.known or node.target in (BEGIN, END):
            return
        if node.target is STANDS:
            self.results[node] = self._body(self.bodies[node.args[0]], node)
            self.moved |= memories(node)
        elif node.args and node.args[0] in self.results:
            self.known[node] = self.results[cast(fx.Node, node.args[0])][cast(int, node.args[1])]
        else:
            made = self.known[node] = self._one(node, self.known)
            if not self.moved.isdisjoint(memories(node)):
                compute(made)

    def _body(self, body: _Body, node: fx.Node) -> list[fx.Node]:
        """A copy for one block; returns what it returns."""
        _, path, given, _ = cast(tuple[Any, str, list[fx.Node], Any], node.args)
        known = self.known | dict(zip(body.given, (self.known[one] for one in given), strict=True))
        for name, there in body.reads.items():
            if (new := self._renamed(name, body, path)) != name:
                known[there] = self.named[new]
        for each in body.nodes:
            known[each] = made = self._one(each, known)
            made.meta[STACK] = _elsewhere(made.meta.get(STACK), body.path, path)
            if each in body.views:
                compute(made)
            else:
                share(made, path + body.places[each])
        return [known[one] for one in body.made]

    def _one(self, node: fx.Node, known: Mapping[fx.Node, fx.Node]) -> fx.Node:
        name = node.name if node.op == "placeholder" else NUMBERED.sub("", node.name)
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        made = self.graph.create_node(node.op, node.target, args, kwargs, name, node.type)
        made.meta = dict(node.meta)
        return made


def _elsewhere(stack: Mapping[str, Any] | None, old: str, new: str) -> dict[str, Any] | None:
    """The modules that made a node, of a block at another path."""
    if stack is None:
        return None
    start, instead = f"{ROOT}{old}", f"{ROOT}{new}"

    def moved(text: str, here: str, there: str) -> str:
        return (
            there + text.removeprefix(here)
            if text.startswith(here) and text[len(here) : len(here) + 1] in ("", ".")
            else text
        )

    return {moved(key, start, instead): (moved(path, old, new), cls) for key, (path, cls) in stack.items()}
