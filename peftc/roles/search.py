"""The way from a value to the linear layer that it comes from or goes to, and what stops it.

A search goes on through operations that leave a projection what it is: moves, elementwise arithmetic, norms. It stops
at the residual stream, and at everything else: recurrences, convolutions, scans, attention, routing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from torch import fx

from peftc.graph.ir import block_of, call_of, expression, is_tensor, module_path, value
from peftc.graph.printing import short_name
from peftc.protocol.sites import Absence
from peftc.roles.flow import ACTIVATIONS, SCORES, nearest
from peftc.roles.products import Product, parameter_of

aten = torch.ops.aten

# Beside views and what is done to each element for itself, which operations say of themselves.
MOVES = """
    _unsafe_view reshape_as lift_fresh_copy _to_copy type_as tile repeat repeat_interleave roll flip rot90 cat concat
    concatenate stack hstack vstack pad constant_pad_nd slice_scatter select_scatter complex polar copy getitem tril
    triu
"""
ARITHMETIC = "masked_fill prelu glu hardswish log_sigmoid dropout native_dropout feature_dropout alpha_dropout"
NORMS = """
    layer_norm native_layer_norm rms_norm _fused_rms_norm group_norm batch_norm instance_norm mean sum var std var_mean
    norm linalg_vector_norm amax max
"""
# Of one of the operands' rows, or into one's rows: routing where which ones depends on what the model computes.
INDEXED = """
    index index_select gather take_along_dim index_add index_put index_copy scatter scatter_add scatter_reduce
    masked_scatter
"""
KNOWN = frozenset(f"{MOVES} {ARITHMETIC} {NORMS}".split())
CHOSEN = frozenset(INDEXED.split())
# The sums that a residual stream is made of.
JOINS = {aten.add.Tensor, aten.sub.Tensor, aten.lerp.Tensor, aten.lerp.Scalar, aten.addcmul.default}

# Whose lines are none of the model's.
LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))

Call = tuple[str | None, str | None]


class Search:
    """Searches over one captured graph."""

    def __init__(
        self, module: fx.GraphModule, flow: nx.DiGraph[fx.Node], products: dict[fx.Node, Product],
        blocks: Iterable[str], further: Collection[str] = (),
    ) -> None:  # fmt: skip
        """`flow` is the graph's values and their readers, `products` its linear layers by their nodes.

        `further` are operations through which these searches go on, beside those through which all do.
        """
        self.module = module
        self.flow = flow
        self.products = products
        self.blocks = frozenset(blocks)
        self.further = further
        self.calls: dict[fx.Node, Call] = {}
        self.place = {node: index for index, node in enumerate(module.graph.nodes)}

    @cached_property
    def features(self) -> set[fx.Node]:
        """What the model computes of its inputs: not positions, masks, tables of angles and parameters as they are."""
        found: set[fx.Node] = set()
        for node in self.module.graph.nodes:
            begins = node in self.products or node.target is aten.embedding.default
            if node.op == "placeholder":
                begins = is_tensor(node) and value(node).is_floating_point()
            if begins or not (_asks_for_size(node) or found.isdisjoint(node.all_input_nodes)):
                found.add(node)
        return found

    @cached_property
    def learnt(self) -> set[fx.Node]:
        """What parameters have a part in: not angles of positions that are given as numbers."""
        found: set[fx.Node] = set()
        for node in self.module.graph.nodes:
            if not found.isdisjoint(node.all_input_nodes) or parameter_of(node):
                found.add(node)
        return found

    @cached_property
    def stream(self) -> dict[fx.Node, set[fx.Node]]:
        """The sums of the residual stream, and those of their terms that sublayers made."""
        found = {node: set(self._branches(node)) for node in self.module.graph.nodes if node.target in JOINS}
        return {node: branches for node, branches in found.items() if branches}

    # The residual stream

    def _branches(self, node: fx.Node) -> Iterator[fx.Node]:
        """The terms of a sum that linear layers make of what another term is, or has in it, as it is."""
        terms = [term for term in node.all_input_nodes if is_tensor(term) and term.op != "get_attr"]
        for branch in terms if len(terms) > 1 and node in self.features else ():
            call = self._call(branch)
            made_by = [other for other in self._behind([branch], call) if other in self.products]
            read = set(self._behind([x for made in made_by for x in self.flow.predecessors(made)], call, across=True))
            first = min((self.place[other] for other in read), default=0)
            if read and any(self._has(term, read, call, first) for term in terms if term is not branch):
                yield branch

    def _has(self, term: fx.Node, read: set[fx.Node], call: Call, first: int) -> bool:
        return any(node in read for node in self._behind([term], call, first=first))

    def _call(self, node: fx.Node) -> Call:
        """The run of a block that a node belongs to."""
        if node not in self.calls:
            block = block_of(node, self.blocks)
            self.calls[node] = block, call_of(node, block) if block else None
        return self.calls[node]

    def _behind(self, starts: Iterable[fx.Node], call: Call, across: bool = False, first: int = 0) -> Iterator[fx.Node]:
        """What `starts` are made of in one run of a block, and what enters that, as far back as to the sum before it.

        Linear layers end it, unless it goes `across` those of the block; so does the place `first`.
        """
        queue = [node for node in starts if node.op != "get_attr"]
        seen = set(queue)
        for node in queue:
            yield node
            outside = self._call(node) != call
            if self.place[node] < first or (outside and node.target in JOINS):
                continue
            if node in self.products and (outside or not across):
                continue
            more = [other for other in self._made_of(node) if other not in seen and other.op != "get_attr"]
            seen.update(more)
            queue += more

    # Searches

    def stops(self, node: fx.Node) -> bool:
        """Whether a search ends at `node`: in the residual stream, or at what is no operation that it knows."""
        if node in self.products or node.op != "call_function" or node not in self.features or self._is_source(node):
            return False
        if node not in self.learnt:
            return False
        return node in self.stream or not self._is_known(node)

    def _is_source(self, node: fx.Node) -> bool:
        """Whether nothing that the model computes lies behind `node`: a table, an input, a constant."""
        return not any(True for _ in self._before(node))

    def _is_input(self, node: fx.Node) -> bool:
        return node.op == "placeholder" or node.target is aten.embedding.default

    def _is_known(self, node: fx.Node) -> bool:
        name = _base(node)
        if name in self.further:
            return True
        if name in CHOSEN:
            return not self._is_routed(node)
        if node.target in SCORES:  # with a constant, such as a rotation
            return sum(node.args[index] in self.features for index in SCORES[node.target]) < 2
        target = node.target
        is_plain = isinstance(target, torch._ops.OpOverload) and (torch.Tag.pointwise in target.tags or target.is_view)
        return is_plain or name in KNOWN

    def _is_routed(self, node: fx.Node) -> bool:
        """Whether its index depends on what the model computes."""
        return any(
            argument in self.features and not self.flow.has_edge(argument, node) for argument in node.all_input_nodes
        )

    def ends(self, operand: fx.Node) -> list[fx.Node]:
        """Where the ways back from a value end, nearest first: at linear layers, at what stops a search, at inputs and
        embeddings, but not at parameters, chosen by a router or not.
        """
        return list(nearest(operand, self._before, lambda node: self._is_end(node) or self._is_input(node)))

    def sources(self, operand: fx.Node) -> list[Product]:
        """All linear layers to which ways back from a value lead, nearest first."""
        return list(dict.fromkeys(self.products[node] for node in self.ends(operand) if node in self.products))

    def project(self, operand: fx.Node) -> Product | fx.Node:
        """The linear layer that an operand comes from, the nearest one, or the node that stopped the search for it.

        What is made of the projection itself and added to it, such as a convolution of it, stops nothing; nor does a
        table that is added.
        """
        ends = self.ends(operand)
        found = next((self.products[node] for node in ends if node in self.products), None)
        for node in ends:
            if self.stops(node) and (found is None or not self.is_made_of(node, found.use.y)):
                return node
        return found or next(iter(ends), operand)

    def other(self, operand: fx.Node, taken: Product) -> Product:
        """Of the layers of one input that an operand is made of alike, the nearest that is not `taken`."""
        found = (one for one in self.sources(operand) if one is not taken and one.use.x is taken.use.x)
        return next(found, taken)

    def is_branch(self, product: Product, other: Product) -> bool:
        """Whether one layer's result is added to another's as LoRA's is: made of the same input by two layers."""
        added = any({*sum_.all_input_nodes} == {product.use.y, other.use.y} for sum_ in product.use.y.users)
        before = self.project(product.use.x) if added else None
        return isinstance(before, Product) and before.use.x is other.use.x

    def beside(self, operand: fx.Node) -> list[Product]:
        """The linear layers of what an operand is put together of: of the tokens of several streams, or of heads."""
        found: list[Product] = []
        for node in nearest(operand, self._before, lambda node: _is_joined(node) or self._is_end(node)):
            ends = [self.project(part) for part in self._before(node)] if _is_joined(node) else []
            found += [end for end in ends if isinstance(end, Product) and end not in found]
        return found

    def readers(self, made: fx.Node) -> list[fx.Node]:
        """The linear layers that a value goes to, and what stops a search for them; nearest first."""
        return list(nearest(made, self._after, lambda node: node is not made and self._is_end(node)))

    def reader(self, made: fx.Node) -> Product | fx.Node:
        """The linear layer that a value goes to, the nearest one, or the node that stopped the search for it.

        Where there is something else that it goes to, the layer is one on the way to the residual stream: no router.
        """
        ends = self.readers(made)
        found = [self.products[node] for node in ends if node in self.products]
        stops = [node for node in ends if node not in self.products]
        options: list[Product | fx.Node] = [*self.joined(made), *stops, *found, made]
        return options[0]

    def joined(self, made: fx.Node) -> list[Product]:
        """Those of the linear layers that read a value that are on the way to the residual stream."""
        found = (self.products[node] for node in self.readers(made) if node in self.products)
        return [product for product in found if self.joins(product.use.y, across=True)]

    def joins(self, made: fx.Node, across: bool = False) -> bool:
        """Whether a value is what a sublayer adds to the residual stream, or `across` a further linear layer.

        On its way experts' tokens may be sorted back and weighted; what goes through an activation, or is multiplied
        with features that go through none, is a mere factor of something; but with numbers that are the same for all
        tokens it stays what it is.
        """
        queue, seen = [made], {made}
        for node in queue:
            for reader in self._after(node):
                if node in self.stream.get(reader, ()):
                    return True
                passes = across if reader in self.products else self._passes(reader) and not self._scales(node, reader)
                if passes and reader not in seen:
                    seen.add(reader)
                    queue.append(reader)
        return False

    def _passes(self, node: fx.Node) -> bool:
        routed = _base(node) in CHOSEN and node not in self.stream
        return node.target not in ACTIVATIONS and (routed or not self.stops(node))

    def _scales(self, node: fx.Node, reader: fx.Node) -> bool:
        """Whether `reader` multiplies `node` with features of its own width that are no gate."""
        others = [other for other in self._before(reader) if other is not node and _base(reader) == "mul"]
        return any(
            1 not in _ends_of(other)
            and any(end.target not in ACTIVATIONS for end in nearest(other, self._before, self._is_gate_or_end))
            for other in others
        )

    def _is_gate_or_end(self, node: fx.Node) -> bool:
        return node.target in ACTIVATIONS or self._is_end(node) or self._is_input(node)

    def is_made_of(self, node: fx.Node, other: fx.Node, across: bool = True) -> bool:
        """Whether `node` depends on `other`, in one run of a block; with or without linear layers in between."""
        return other in self._behind([node], self._call(node), across)

    def _is_end(self, node: fx.Node) -> bool:
        return node in self.products or self.stops(node)

    def _before(self, node: fx.Node) -> Iterator[fx.Node]:
        return (other for other in self._made_of(node) if other in self.features and other.op != "get_attr")

    def _made_of(self, node: fx.Node) -> list[fx.Node]:
        """What a value has its features of: not a number of each token's that they are multiplied with."""
        found = list(self.flow.predecessors(node))
        return (
            [one for one in found if not any(_weighs(one, other) for other in found)] if _base(node) == "mul" else found
        )

    def _after(self, node: fx.Node) -> Iterator[fx.Node]:
        return (other for other in self.flow.successors(node) if other in self.features)

    # What was not found

    def absence(self, role: str, name: str, end: Product | fx.Node) -> Absence:
        """That the search for `role` ended at `end`."""
        if isinstance(end, Product):
            return Absence(role, name, end.weight.removesuffix(".weight"))
        operation = short_name(end) if end.op == "call_function" else str(end.target)
        return Absence(role, name, operation, module_path(end), _line(end), end in self.stream)


def _ends_of(node: fx.Node) -> tuple[Any, ...]:
    """How many tokens and features a value has: one where it is the same for all of them."""
    return tuple(size for size in value(node).shape[-2:] if isinstance(size, int))


def _weighs(one: fx.Node, other: fx.Node) -> bool:
    """Whether a factor has one number where the other has all the features of a token."""
    if one is other or not (is_tensor(one) and is_tensor(other)):
        return False
    (*rows, width), (*others, features) = (
        [expression(size) for size in value(node).shape] or [0] for node in (one, other)
    )
    return width == 1 and isinstance(features, int) and features > 1 and rows == others


def _asks_for_size(node: fx.Node) -> bool:
    """Whether a node has nothing of its operand but the size or the kind."""
    name = _base(node)
    return name == "sym_size" or name.startswith("new_") or name.endswith("_like")


def _is_joined(node: fx.Node) -> bool:
    """Whether a value is put together of several that lie behind each other, with the same features each."""
    return _base(node) in ("cat", "concat") and _dim(node) % value(node).dim() != value(node).dim() - 1


def _dim(node: fx.Node) -> int:
    found = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(found, int)
    return found


def _base(node: fx.Node) -> str:
    """An operation's name, whether or not it writes in place."""
    return short_name(node).rstrip("_") if node.op == "call_function" else ""


def _line(node: fx.Node) -> str:
    """The innermost line outside of torch and peftc that made `node`: file name and number."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', str(node.meta.get("stack_trace", "")))
    own = [f"{Path(path).name}:{line}" for path, line in lines if not path.startswith(LIBRARIES)]
    return own[-1] if own else ""
