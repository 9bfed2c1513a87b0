"""Graph -> sites with roles, by data flow alone.

q, k and v are the nearest linear ancestors of an attention's operands, o its nearest linear descendant. The `down`
of a feed-forward layer is a linear layer whose input is made from linear layers of one common input through an
activation; of those the one that passes through the activation is the gate, where there are two. A fused weight
gives sites that are sets of its rows. No module name means anything here.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import networkx as nx
import torch
from torch import fx

from peftc.capture.capture import Captured
from peftc.graph.ir import get_attribute, module_path, own_name, value
from peftc.graph.rows import Known, feature_rows, path_between, runs_along
from peftc.kernels.island import Island
from peftc.protocol.site import Attention, AttentionPattern, Experts, Linear, Parameters, Site, Sublayer
from peftc.protocol.sites import Absence, Sites, further
from peftc.roles.attention.heads import attention_facts
from peftc.roles.attention.linear import FURTHER, linear_roles
from peftc.roles.counting import with_limits
from peftc.roles.flow import ACTIVATIONS, attentions, before_routing, nearest, residual_value, value_flow
from peftc.roles.parameters import CONVOLUTIONS, existing_parameters
from peftc.roles.products import Inside, Product, inside_islands, products
from peftc.roles.residual import Crossing, block_sites
from peftc.roles.search import Search
from peftc.roles.sequences import find_sequences
from peftc.roles.stacks import BlockPath, find_blocks, name_stacks, placed

aten = torch.ops.aten

Rows = tuple[int, ...] | None


def find_sites(captured: Captured) -> Sites:
    """Everything `captured` offers to selectors, in the order of its forward pass."""
    return _Finder(captured).sites()


class _Finder:
    """One walk over one captured model. Roles collect per (weight, rows) before sites are made."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.module = captured.module
        self.flow: nx.DiGraph[fx.Node] = value_flow(self.module.graph)
        self.products = products(self.module.graph)
        self.inside: dict[str, list[Inside]] = defaultdict(list)
        for layer in inside_islands(self.module.graph):
            self.inside[layer.weight].append(layer)
        self.by_node: dict[fx.Node, Product] = {}
        for product in self.products:
            self.by_node[product.use.op] = product
            self.by_node[product.use.y] = product
        self.blocks = find_blocks(captured.model)
        self.search = Search(self.module, self.flow, self.by_node, [block.path for block in self.blocks])
        self.aliases = captured.aliases
        self.known_rows: Known = {}
        self.roles: dict[tuple[str, Rows], set[str]] = defaultdict(set)
        self.modules: list[Sublayer] = []
        self.absent: dict[tuple[str, str], Absence] = {}
        self.crossing: Crossing = {}
        self.model_name = type(captured.model).__name__

    def sites(self) -> Sites:
        decoders = self._attentions()
        self._feed_forwards()
        self._head()
        self._without_role()
        blocks = name_stacks(self.blocks, decoders)
        self._join()
        linear = list(self._linear_sites())
        items: list[Site] = [*linear, *with_limits(self.module, self.modules)]
        whole = block_sites(self.module.graph, self.flow, self.blocks, self._is_product, self.crossing)
        items += existing_parameters(self.module, whole, self.aliases)
        alone = {site.name for site in items if isinstance(site, Parameters)}
        taken = {site.name for site in items} - alone
        more = {site.name: site for site in further(self.module, taken, self.aliases)}
        items = [*(more.pop(site.name, site) for site in items), *more.values()]  # more than mere parameters
        sizes = {
            str(node.target): get_attribute(self.module, str(node.target)).numel()
            for node in self.module.graph.find_nodes(op="get_attr")
            if isinstance(get_attribute(self.module, str(node.target)), torch.nn.Parameter)
        }
        sequences = find_sequences(self.captured, blocks)
        everything, paths = tuple(placed(site, blocks) for site in items), tuple(block.path for block in blocks)
        return Sites(self.model_name, everything, sizes, paths, sequences, tuple(self.absent.values()))

    def _is_product(self, node: fx.Node) -> bool:
        return node in self.by_node

    def _project(self, operand: fx.Node) -> Product | None:
        """The linear layer an operand comes from."""
        found = self.search.project(operand)
        return found if isinstance(found, Product) else None

    def _behind(self, product: Product) -> Iterator[Product]:
        """A linear layer, the one that its input comes from, and so on in its sublayer."""
        block, found = self._block_of(product.weight), product
        yield product
        while block and (before := self._project(found.use.x)) and self._block_of(before.weight) is block:
            found = before
            yield found

    def _meeting(self, q: Product | fx.Node, k: Product | fx.Node) -> tuple[list[Product], list[Product], str]:
        """The linear layers from q and from k back to the two that read one value, and the kind of their attention.

        Those of a latent attention are two a side. In cross attention keys are made of something else; where one of the
        two is no linear layer, it says which kind it is what it is made of.
        """
        if not isinstance(q, Product) or not isinstance(k, Product):
            made = next((end for end in (q, k) if isinstance(end, Product)), None)
            other = k if made is q else q
            same = made is None or (isinstance(other, fx.Node) and self.search.is_made_of(other, made.use.x))
            return [], [], "self" if same else "cross"
        behind = list(self._behind(q)), list(self._behind(k))
        for i, first in enumerate(behind[0], 1):
            for j, second in enumerate(behind[1], 1):
                if first.use.x is second.use.x:
                    return behind[0][:i], behind[1][:j], "self"
        # Such as keys of an image that a convolution made smaller.
        return [q], [], "self" if self.search.is_made_of(k.use.x, q.use.x, across=False) else "cross"

    def _reads_same(self, k: fx.Node, v: fx.Node) -> bool:
        first, second = self._project(k), self._project(v)
        return bool(first and second and first.use.x is second.use.x)

    def _rows(self, source: Product, target: fx.Node) -> tuple[int, ...]:
        """The rows of a weight that a value is made of."""
        found = feature_rows(self.module, source.use.y, target, self.known_rows)
        return tuple(row + source.use.first for row in found)

    def _part(self, product: Product, operand: fx.Node) -> Rows:
        """The rows of a linear layer that an operand is made of, where others are something else: a gate, a key."""
        rows = self._rows(product, operand)
        return rows if len(rows) < product.n_out else None

    def _attentions(self) -> set[str]:
        """Gives q, k, v, o their roles; returns the paths of blocks with cross attention."""
        decoders = set()
        for found in attentions(self.module.graph, self.flow, self._reads_same):
            if found.scores in self.by_node:  # with a weight: no attention, but a router
                continue
            operands = {"q": found.q, "k": found.k, "v": found.v}
            ends = {letter: self.search.project(operand) for letter, operand in operands.items()}
            ends["o"] = self.search.reader(found.out)
            if ends["q"] is ends["k"] and isinstance(q := ends["q"], Product):
                alike = self._part(q, found.q) == self._part(q, found.k)
                ends["k"] = self.search.other(found.k, q) if alike else q
            made = {letter: end for letter, end in ends.items() if isinstance(end, Product)}
            queries, keys, kind = self._meeting(ends["q"], ends["k"])
            if kind == "cross" and "k" in made and (block := self._block_of(made["k"].weight)):
                decoders.add(block.stack)
                self.crossing[block.path] = found, made["k"].use.x
            parts = {letter: self._part(made[letter], operands[letter]) for letter in operands if letter in made}
            projections = [(letter, product, parts.get(letter)) for letter, product in made.items()]
            for letter, product, rows in [*projections, *self._other_streams(found)]:
                self.roles[product.weight, rows] |= {f"attn.{letter}", f"{kind}.attn.{letter}"}
            for letter in (each for each in ends if each not in made):
                self._is_absent(f"attn.{letter}", module_path(found.out), ends[letter])
            if len(made) == len(ends):
                facts = attention_facts(self.module, found, made["k"], made["v"], list(parts.values()), self.known_rows)
                self._attention_module(queries[::-1], [*keys[::-1], made["k"], made["v"]], made["o"], kind, facts)
        search = Search(self.module, self.flow, self.by_node, self.search.blocks, FURTHER)
        for letter, product, rows in linear_roles(self.module.graph, search, self._rows):
            self.roles[product.weight, rows] |= {f"attn.{letter}", f"self.attn.{letter}"}
        return decoders

    def _other_streams(self, found: AttentionPattern) -> Iterator[tuple[str, Product, Rows]]:
        """The projections of an attention over several streams, each of which has layers of its own."""
        operands = {"q": found.q, "k": found.k, "v": found.v}
        streams = {letter: self.search.beside(operand) for letter, operand in operands.items()}
        for letter, each in streams.items():
            yield from ((letter, product, self._part(product, operands[letter])) for product in each)
        if len(streams["q"]) > 1:
            yield from (("o", product, None) for product in self.search.joined(found.out))

    def _is_absent(self, role: str, name: str, end: fx.Node | Product) -> None:
        """Notes that a search for `role`, of the sublayer or linear layer `name`, ended at `end`."""
        self.absent.setdefault((role, name), self.search.absence(role, name, end))

    def _attention_module(
        self, queries: list[Product], others: list[Product], o: Product, kind: str, facts: dict[str, Any] | None
    ) -> None:
        """Adds the sublayer from the first of `queries` to `o`, the linear layer behind the attention."""
        make = partial(Attention, **facts, cross=kind == "cross") if facts else Sublayer
        roles, members = frozenset({"attn", f"{kind}.attn"}), [*queries, *others, o]
        self._add_module("attn", roles, queries[0], o, members, make)

    def _feed_forwards(self) -> None:
        """Gives up, gate and down their roles, in what is added to the residual stream."""
        attention = {weight for weight, _ in self.roles}
        for down in self.products:
            if down.weight in attention or self._block_of(down.weight) is None:
                continue
            sources = self._activated_sources(down)
            if isinstance(sources, fx.Node):
                if self.search.joins(down.use.y):
                    self._is_absent("mlp.up", self._own(down)[1], sources)
            elif sources and self.search.joins(down.use.y, across=True):
                self.roles[down.weight, None].add("mlp.down")
                self._up_and_gate(down, sources)
                self._add_module("mlp", frozenset({"mlp"}), sources[0], down, [*sources, down])

    def _activated_sources(self, down: Product) -> list[Product] | fx.Node:
        """The linear layers of one common input that reach `down` through an activation, else none; or the node that
        stopped the search for them.

        A convolution over the grid of an image, which is all that stands in between, is a part of the layer.
        """
        ends = self.search.ends(down.use.x)
        while len(ends) == 1 and ends[0].target in CONVOLUTIONS and value(ends[0]).dim() == 4:
            ends = self.search.ends(ends[0].all_input_nodes[0])
        if stop := next((node for node in ends if node not in self.by_node), None):
            return stop
        sources = sorted({self.by_node[node] for node in ends}, key=self.products.index)
        sources = [source for source in sources if not any(map(partial(self.search.is_branch, source), sources))]
        if any(source.use.x is not sources[0].use.x for source in sources):
            return []
        if any(runs_along(self.module, source.use.y, down.use.x, self.known_rows) for source in sources):
            return down.use.x
        return sources if self._activations(down, sources) else []

    def _activations(self, down: Product, sources: list[Product]) -> list[fx.Node]:
        """The activations next to `down` between it and its sources."""
        starts = [source.use.y for source in sources]
        found = nearest(down.use.x, self._stopping_at(starts), lambda node: node.target in ACTIVATIONS)
        # An activation may have parameters of its own, which pass through another first.
        return [node for node in found if any(path_between(start, node) for start in starts)]

    def _up_and_gate(self, down: Product, sources: list[Product]) -> None:
        """Of two factors the gate is the one that passes through the activation."""
        activations = self._activations(down, sources)
        gates = {
            id(source)
            for activation in activations
            for hit in nearest(activation, self.flow.predecessors, self._is_product)
            if (source := self.by_node[hit]) in sources
        }
        if len(sources) > 1:
            for source in sources:
                self.roles[source.weight, None].add("mlp.gate" if id(source) in gates else "mlp.up")
            return
        (source,) = sources
        rows = self._activated_rows(source, activations)
        if rows is None:
            self.roles[source.weight, None].add("mlp.up")
        else:
            # A weight may hold more than this layer's two halves: what down does not read is neither.
            rest = tuple(sorted(set(self._rows(source, down.use.x)) - set(rows)))
            self.roles[source.weight, rows].add("mlp.gate" if rest else "mlp.up")
            if rest:
                self.roles[source.weight, rest].add("mlp.up")

    def _stopping_at(self, ends: list[fx.Node]) -> Callable[[fx.Node], Iterator[fx.Node]]:
        return lambda node: iter(()) if node in ends else self.flow.predecessors(node)

    def _activated_rows(self, source: Product, activations: list[fx.Node]) -> Rows:
        """The rows that the activation sees, where it does not see all of them."""
        rows: set[int] = set()
        for activation in activations:
            operand = activation.args[0]
            assert isinstance(operand, fx.Node)
            rows |= set(self._rows(source, operand))
        return tuple(sorted(rows)) if 0 < len(rows) < source.n_out else None

    def _add_module(
        self, kind: str, roles: frozenset[str], entry: Product, last: Product, members: list[Product],
        make: Callable[..., Sublayer] = Sublayer,
    ) -> None:  # fmt: skip
        path = os.path.commonpath([member.weight.replace(".", "/") for member in members]).replace("/", ".")
        block = self._block_of(last.weight)
        if block is not None and path == block.path:
            path = f"{block.path}.{kind}"
        known = next((place for place, module in enumerate(self.modules) if module.name == path), None)
        if known is not None:
            self.modules[known] = replace(self.modules[known], repeated=self._again(self.modules[known], entry))
            return
        names = dict.fromkeys(member.weight for member in members)
        biases = dict.fromkeys(member.bias for member in members if member.bias)
        h = residual_value(last.use.y)
        self.modules.append(
            make(
                path, path, roles, parameters=(*names, *biases),
                width=int(value(h).shape[-1]), entry_width=entry.n_in, h=h,
                entry=before_routing(self.flow, entry.use, h) if entry.experts else entry.use,
            )
        )  # fmt: skip

    def _again(self, known: Sublayer, entry: Product) -> bool:
        """Whether a sublayer that was found before is found in another of its runs."""
        assert known.entry is not None
        same = known.parameters[0] == entry.weight
        return known.repeated or (same and known.entry.y is not entry.use.y)

    def _head(self) -> None:
        """The linear layers outside every block that nothing linear stands behind, but projections of an attention."""
        attention = {weight for weight, _ in self.roles}
        (output,) = self.module.graph.find_nodes(op="output")
        for hit in nearest(output, self.flow.predecessors, self._is_product):
            product = self.by_node[hit]
            if self._block_of(product.weight) is None and product.weight not in attention:
                self.roles[product.weight, None].add("head")

    def _without_role(self) -> None:
        """Says of each linear layer in a block that has no role what is done with its result."""
        for product in self.products:
            name = self._own(product)[1]
            given = any(weight == product.weight for weight, _ in self.roles)
            if not given and self._block_of(product.weight) and ("mlp.up", name) not in self.absent:
                ends = self.search.readers(product.use.y) or self.module.graph.find_nodes(op="output")
                other = next((node for node in ends if node not in self.by_node), None)
                self._is_absent("", name, other or self.by_node[ends[0]])

    def _own(self, product: Product) -> tuple[str, str]:
        """The layer's own name for its weight, and the layer's name."""
        owner = own_name(product.weight, module_path(product.use.op), self.aliases)
        return owner, owner.removesuffix(".weight")

    def _block_of(self, parameter: str) -> BlockPath | None:
        return next((block for block in self.blocks if parameter.startswith(f"{block.path}.")), None)

    def _join(self) -> None:
        """Parts of a weight that are all of it, and all for the same, are no parts, as v of two attentions."""
        parts: dict[str, dict[tuple[int, ...], set[str]]] = defaultdict(dict)
        for (weight, rows), roles in self.roles.items():
            if rows:
                parts[weight][rows] = roles
        sizes = {product.weight: product.n_out for product in self.products}
        for weight, found in parts.items():
            first, *others = found.values()
            if others and all(one == first for one in others) and sorted(sum(found, ())) == [*range(sizes[weight])]:
                self.roles[weight, None] |= first
                for rows in found:
                    del self.roles[weight, rows]

    def _linear_sites(self) -> Iterator[Site]:
        grouped: dict[str, list[Product]] = defaultdict(list)
        for product in self.products:
            grouped[product.weight].append(product)
        for weight, uses in grouped.items():
            parts: list[Rows] = [None, *(rows for name, rows in self.roles if name == weight and rows)]
            taken: set[str] = set()
            for rows in parts:
                site = self._linear_site(weight, rows, [use for use in uses if use.has(rows)])
                count = sum(name.startswith(site.name.rstrip("]")) for name in taken) if rows else 0
                taken.add(site.name)
                yield replace(site, name=f"{site.name[:-1]}{count + 1}]") if count else site
        for weight, layers in self.inside.items():
            if weight not in grouped:
                yield self._in_an_island(weight, layers)

    def _in_an_island(self, weight: str, layers: list[Inside]) -> Site:
        """A linear layer of which nothing is known but its weight: what it is for shows in no graph."""
        first = layers[0]
        return Linear(
            first.name, first.name, frozenset({"linear"}),
            parameters=(weight, first.bias) if first.bias else (weight,),
            n_in=first.layer.in_features, n_out=first.layer.out_features, weight=weight, owner=f"{first.name}.weight",
            bias=first.bias, tied=self._is_tied(weight), mixed=len({layer.bias for layer in layers}) > 1,
            within=tuple(dict.fromkeys(layer.reader for layer in layers)),
        )  # fmt: skip

    def _linear_site(self, weight: str, rows: Rows, uses: list[Product]) -> Site:
        first = uses[0]
        roles = frozenset(self.roles.get((weight, rows), set()))
        owner, whole = self._own(first)
        path = owner.removesuffix(".weight") if owner.endswith(".weight") else owner.rpartition(".")[0]
        label = sorted(role.rsplit(".", 1)[-1] for role in roles)[0] if rows else ""
        name = f"{whole}[{label}]" if rows else whole
        n_out = len(rows) if rows else first.n_out
        bias = first.bias
        kind = partial(Experts, experts=first.experts) if first.experts else Linear
        roles |= {"expert"} if first.experts else set()
        return kind(
            name, path, roles if rows else roles | {"linear"},
            parameters=(weight, bias) if bias else (weight,),
            n_in=first.n_in, n_out=n_out, weight=weight, owner=owner, bias=bias, transposed=first.transposed, rows=rows,
            tied=self._is_tied(weight), mixed=len({(use.transposed, use.bias) for use in uses}) > 1,
            uses=tuple(product.use for product in uses),
            within=tuple(dict.fromkeys(layer.reader for layer in self.inside.get(weight, ()))),
        )  # fmt: skip

    def _is_tied(self, weight: str) -> bool:
        """Whether something other than this linear layer reads the weight, such as an embedding."""
        (node,) = self.module.graph.find_nodes(op="get_attr", target=weight)
        known = {layer.reader for layer in self.inside.get(weight, ())}
        return any(
            user.target is aten.embedding.default or (isinstance(user.target, Island) and user not in known)
            for user in node.users
        )
