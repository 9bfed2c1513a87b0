"""Sequence methods -> nodes: the inputs are padded, prompts take the padding's place, the outputs lose it again.

With k positions added to the inputs, every length, mask and position that the graph computes from them follows; only
the fake values have to be computed anew. Where the length is a constant of the graph (images), the constants change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.ir import (
    PROVENANCE,
    STACK,
    Provenance,
    attribute_node,
    computed,
    elsewhere,
    expression,
    is_tensor,
    memories,
    redirect,
    splice,
    trace,
    value,
)  # fmt: skip
from peftc.planning.errors import Refused
from peftc.planning.plan import Binding
from peftc.protocol.operands import wanted
from peftc.protocol.site import Sequence
from peftc.roles.images import SIZED, downstream, upstream

aten = torch.ops.aten

END = 2**63 - 1
MASK = "mask"  # the name by which a rewrite asks for the attention mask


def insert_prompts(module: fx.GraphModule, bindings: list[Binding], pass_name: str) -> None:
    """Applies `bindings`, all of one sequence: what adds no positions first, then in file order, each before the last.

    Raises:
        PeftcError: `refused` if a shape turns out to be fixed in a way that no prompt fits in.
    """
    _Prompting(module, bindings, pass_name).run()


class _Prompting:
    def __init__(self, module: fx.GraphModule, bindings: list[Binding], pass_name: str) -> None:
        site = bindings[0].site
        assert isinstance(site, Sequence)
        assert site.embeddings is not None
        self.module, self.graph, self.site, self.pass_name = module, module.graph, site, pass_name
        self.entry = site.embeddings
        self.bindings = sorted(bindings, key=lambda binding: binding.method.lengthens(site) > 0)
        self.count = sum(binding.method.lengthens(site) for binding in bindings)
        self.inputs: dict[str, fx.Node] = {str(node.target): node for node in self.graph.find_nodes(op="placeholder")}
        self.mask = self.inputs.get(site.mask) if site.mask else None
        self.stamp = Provenance(pass_name, site.name, self.bindings[-1].span)
        self.before = {node: value(node).shape for node in self.graph.nodes if is_tensor(node)}

    def run(self) -> None:
        """Pads the inputs, splices the methods behind the embedding, cuts the outputs."""
        x = self.entry
        if self.count and self.site.length is None:
            self._propagate(self._pad_inputs())
            x = self._behind(self.entry, aten.slice.Tensor, (self.entry, 1, self.count, END))
        result, made = x, {x}
        for binding in self.bindings:
            result, new = self._insert(binding, x=result)
            made |= set(new)
        redirect(self.entry, result, keep=made)
        if self.count and self.site.length is not None:
            self._lengthen(self.site.length, made)
        if self.count:
            self._cut_outputs()

    # Inputs

    def _pad_inputs(self) -> set[fx.Node]:
        padded = set()
        for name, filler in self.site.filled:
            node = self.inputs[name]
            padded.add(self._replace(node, aten.constant_pad_nd.default, (node, [self.count, 0], filler)))
        if self.site.position_ids:
            padded.add(self._count_on(self.inputs[self.site.position_ids]))
        return padded

    def _count_on(self, positions: fx.Node) -> fx.Node:
        """The prompt's positions are 0 … k-1, and all that were given come behind them."""
        count = self.count

        def counted(given: Tensor) -> Tensor:
            first = given.new_ones(count).cumsum(0, dtype=given.dtype) - 1
            return torch.cat([first.expand(given.shape[0], -1), given + count], 1)

        template = trace(counted, value(positions))
        result, made = splice(self.graph, template, [positions], self._last_input(), self.stamp)
        redirect(positions, result, keep=made)
        return result

    def _last_input(self) -> fx.Node:
        return list(self.inputs.values())[-1]

    def _replace(self, node: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
        """A node behind the inputs, which all readers of `node` read instead."""
        made = self._behind(self._last_input(), target, args)
        redirect(node, made, keep=[made])
        return made

    def _behind(self, after: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
        with self.graph.inserting_after(after):
            made = self.graph.call_function(target, args)
        made.meta[PROVENANCE] = self.stamp
        made.meta[STACK] = after.meta.get(STACK)
        made.meta["val"] = computed(made)
        return made

    # The methods

    def _insert(self, binding: Binding, x: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
        """The binding's rewrite behind `x`."""
        tensors = {name: attribute_node(self.graph, self.module, full) for name, full in binding.names.items()}
        if self.mask is not None and MASK in wanted(type(binding.method).rewrite, 3):
            tensors[MASK] = self.mask
        names = tuple(tensors)

        def function(given: Tensor, *rest: Tensor) -> Tensor:
            state = dict(zip(names, rest, strict=True))
            result: Tensor = binding.method.rewrite(self.site, given, **state)
            return result

        args = [x, *tensors.values()]
        template = trace(function, *(value(node) for node in args))
        stamp = Provenance(self.pass_name, self.site.name, binding.span)
        return splice(self.graph, template, args, x, stamp)

    # What follows

    def _propagate(self, changed: set[fx.Node]) -> None:
        """Computes the fake values of all that depends on `changed`."""
        affected = set().union(*(downstream(node) for node in changed))
        known: dict[tuple[Any, str], Any] = {}
        for node in self.graph.nodes:
            if node in affected and node.op == "call_function":
                _compute(node, known)

    def _lengthen(self, length: int, made: set[fx.Node]) -> None:
        """Writes the new length for the old one in every size behind the embedding, and checks every shape."""
        fixed = upstream(self.entry) | made
        behind = [node for node in self.graph.nodes if node not in fixed and node.op == "call_function"]
        for node in behind:
            if node.target in SIZED:
                changed = fx.node.map_aggregate(
                    (node.args, node.kwargs),
                    lambda item: length + self.count if type(item) is int and item == length else item,
                )
                node.args, node.kwargs = changed
        try:
            known: dict[tuple[Any, str], Any] = {}
            for node in behind:
                _compute(node, known)
        except (RuntimeError, TypeError, ValueError) as error:
            raise self._fixed(str(error).splitlines()[0]) from error
        for node in behind:
            if is_tensor(node) and node in self.before:
                pairs = zip(self.before[node], value(node).shape, strict=True)
                if not all(self._follows(expression(old), expression(new), length) for old, new in pairs):
                    raise self._fixed(f"{node.name} would change from {self.before[node]} to {value(node).shape}")

    def _follows(self, old: Any, new: Any, length: int) -> bool:
        """Whether a size stayed, or counts positions: alone, with others beside them, or times another size."""
        return bool(old == new or new - old == self.count or new * length == old * (length + self.count))

    def _fixed(self, reason: str) -> PeftcError:
        why = f"its length is fixed in a way that cannot be changed: {reason}"
        return PeftcError(
            Refused(method=self.bindings[-1].method.name, site="the model's sequence", reason=why, others=0,
                    span=self.bindings[-1].span)
        )  # fmt: skip

    def _cut_outputs(self) -> None:
        """What comes back has the length that went in."""
        (output,) = self.graph.find_nodes(op="output")
        start, end = (self.count, END) if self.site.in_front else (0, -self.count)
        for leaf in {leaf for leaf in output.all_input_nodes if is_tensor(leaf)}:
            cut = leaf
            for dim, (old, new) in enumerate(zip(self.before[leaf], value(leaf).shape, strict=True)):
                if str(old) == str(new):
                    continue
                if expression(new) - expression(old) != self.count:
                    raise self._fixed(f"its output has {new} places where there were {old}")
                cut = self._behind(cut, aten.slice.Tensor, (cut, dim, start, end))
            if cut is not leaf:
                output.replace_input_with(leaf, cut)


def _compute(node: fx.Node, known: dict[tuple[Any, str], Any]) -> None:
    """Sets the fake value of `node` from those of its inputs; equal blocks ask the same questions.

    The answer is another's numbers in memory of its own: values in one memory are taken for views of one tensor.
    """
    inputs = fx.map_arg((node.args, node.kwargs), lambda given: given.meta["val"])
    key = (node.target, str(pytree.tree_map(_signature, inputs)))
    if key in known:
        node.meta["val"] = elsewhere(node.graph, known[key])
        return
    node.meta["val"] = computed(node)
    if not any(memories(node) & memories(source) for source in node.all_input_nodes):  # a view is of its own input
        known[key] = node.meta["val"]


def _signature(given: Any) -> str:
    if isinstance(given, torch.Tensor):
        return f"{tuple(given.shape)} {given.stride()} {given.dtype} {given.device}"
    return str(given)
