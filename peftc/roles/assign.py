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
from peftc.graph.ir import get_attribute, module_path, value
from peftc.graph.rows import Known, feature_rows
from peftc.protocol.site import Attention, AttentionPattern, Experts, Linear, Site, Sublayer
from peftc.protocol.sites import Sites, site_kinds
from peftc.roles.counting import with_limits
from peftc.roles.flow import ACTIVATIONS, attentions, before_routing, nearest, residual_value, value_flow
from peftc.roles.heads import attention_facts
from peftc.roles.parameters import existing_parameters, own_name
from peftc.roles.products import Product, products
from peftc.roles.residual import Crossing, block_sites
from peftc.roles.sequences import find_sequences
from peftc.roles.stacks import BlockPath, find_blocks

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
        self.by_node: dict[fx.Node, Product] = {}
        for product in self.products:
            self.by_node[product.use.op] = product
            self.by_node[product.use.y] = product
        self.blocks = find_blocks(captured.model)
        self.aliases = captured.aliases
        self.known_rows: Known = {}
        self.roles: dict[tuple[str, Rows], set[str]] = defaultdict(set)
        self.modules: list[Sublayer] = []
        self.crossing: Crossing = {}
        self.model_name = type(captured.model).__name__

    def sites(self) -> Sites:
        decoders = self._attentions()
        self._feed_forwards()
        self._head()
        blocks = _name_stacks(self.blocks, decoders)
        linear = list(self._linear_sites())
        items: list[Site] = [*linear, *with_limits(self.module, self.modules)]
        whole = block_sites(self.module.graph, self.flow, self.blocks, self._is_product, self.crossing)
        items += existing_parameters(self.module, whole, self.aliases)
        items += _further(self.module, {site.name for site in items})
        placed = tuple(_place(site, blocks) for site in items)
        sizes = {
            str(node.target): get_attribute(self.module, str(node.target)).numel()
            for node in self.module.graph.find_nodes(op="get_attr")
            if isinstance(get_attribute(self.module, str(node.target)), torch.nn.Parameter)
        }
        paths = tuple(block.path for block in blocks)
        return Sites(self.model_name, placed, sizes, paths, find_sequences(self.captured, blocks))

    def _is_product(self, node: fx.Node) -> bool:
        return node in self.by_node

    def _project(self, operand: fx.Node) -> Product | None:
        """The linear layer an operand comes from."""
        found = next(nearest(operand, self.flow.predecessors, self._is_product), None)
        return self.by_node[found] if found else None

    def _behind(self, product: Product) -> Iterator[Product]:
        """A linear layer, the one that its input comes from, and so on in its block, back to the attention before."""
        block, found = self._block_of(product.weight), product
        yield product
        while block and (before := self._project(found.use.x)) and self._block_of(before.weight) is block:
            if "attn.o" in self.roles.get((before.weight, None), ()):  # another attention lies before this one
                return
            found = before
            yield found

    def _meeting(self, q: Product, k: Product) -> tuple[list[Product], list[Product]] | None:
        """The linear layers from q and from k back to the two that read one value: those of a latent attention are
        two a side. None for cross attention, whose keys come from outside of the block.
        """
        behind = list(self._behind(q)), list(self._behind(k))
        for i, first in enumerate(behind[0], 1):
            for j, second in enumerate(behind[1], 1):
                if first.use.x is second.use.x:
                    return behind[0][:i], behind[1][:j]
        return None

    def _reads_same(self, k: fx.Node, v: fx.Node) -> bool:
        first, second = self._project(k), self._project(v)
        return bool(first and second and first.use.x is second.use.x)

    def _rows(self, source: fx.Node, target: fx.Node) -> tuple[int, ...]:
        return feature_rows(self.module, source, target, self.known_rows)

    def _attentions(self) -> set[str]:
        """Gives q, k, v, o their roles; returns the paths of blocks with cross attention."""
        decoders = set()
        for found in attentions(self.module.graph, self.flow, self._reads_same):
            q, k, v = (self._project(operand) for operand in (found.q, found.k, found.v))
            if q is None or k is None or v is None:
                continue
            queries, keys = self._meeting(q, k) or ([q], [])
            kind = "self" if keys else "cross"
            if kind == "cross" and (block := self._block_of(q.weight)):
                decoders.add(block.stack)
                self.crossing[block.path] = found, k.use.x
            parts: list[Rows] = []
            for letter, product, operand in (("q", q, found.q), ("k", k, found.k), ("v", v, found.v)):
                fused = sum(other.use.op is product.use.op for other in (q, k, v)) > 1
                parts.append(self._rows(product.use.y, operand) if fused else None)
                self.roles[product.weight, parts[-1]] |= {f"attn.{letter}", f"{kind}.attn.{letter}"}
            facts = attention_facts(self.module, found, k, v, parts, self.known_rows)
            self._attention_module(found, queries[::-1], [*keys[::-1], k, v], kind, facts)
        return decoders

    def _attention_module(
        self,
        found: AttentionPattern,
        queries: list[Product],
        others: list[Product],
        kind: str,
        facts: dict[str, Any] | None,
    ) -> None:
        """Adds the sublayer from the first of `queries` to the linear layer behind the attention."""
        hit = next(nearest(found.out, self.flow.successors, self._is_product), None)
        if hit is None:
            return
        o = self.by_node[hit]
        self.roles[o.weight, None] |= {"attn.o", f"{kind}.attn.o"}
        make = partial(Attention, **facts, cross=kind == "cross") if facts else Sublayer
        roles, members = frozenset({"attn", f"{kind}.attn"}), [*queries, *others, o]
        self._add_module("attn", roles, queries[0], o, members, make)

    def _feed_forwards(self) -> None:
        """Gives up, gate and down their roles."""
        attention = {weight for weight, _ in self.roles}
        for down in self.products:
            if down.weight in attention or self._block_of(down.weight) is None:
                continue
            sources = self._activated_sources(down)
            if sources:
                self.roles[down.weight, None].add("mlp.down")
                self._up_and_gate(down, sources)
                self._add_module("mlp", frozenset({"mlp"}), sources[0], down, [*sources, down])

    def _activated_sources(self, down: Product) -> list[Product]:
        """The linear layers of one common input that reach `down` through an activation, else none."""
        seen, queue, activated = {down.use.x}, [down.use.x], False
        sources: list[Product] = []
        while queue:
            node = queue.pop()
            if (product := self.by_node.get(node)) is not None:
                if sources and sources[0].use.x is not product.use.x:
                    return []
                sources.append(product)
                continue
            if node.op == "placeholder" or node.target in (
                aten.embedding.default,
                aten.scaled_dot_product_attention.default,
            ):
                return []
            activated |= node.target in ACTIVATIONS
            for other in self.flow.predecessors(node):
                if other not in seen and other.op != "get_attr":
                    seen.add(other)
                    queue.append(other)
        return sorted(sources, key=self.products.index) if activated and sources else []

    def _up_and_gate(self, down: Product, sources: list[Product]) -> None:
        """Of two factors the gate is the one that passes through the activation."""
        starts = [source.use.y for source in sources]
        activations = list(nearest(down.use.x, self._stopping_at(starts), lambda node: node.target in ACTIVATIONS))
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
            rest = tuple(sorted(set(self._rows(source.use.y, down.use.x)) - set(rows)))
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
            rows |= set(self._rows(source.use.y, operand))
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
        """The linear layers outside every block that nothing linear stands behind."""
        (output,) = self.module.graph.find_nodes(op="output")
        for hit in nearest(output, self.flow.predecessors, self._is_product):
            product = self.by_node[hit]
            if self._block_of(product.weight) is None:
                self.roles[product.weight, None].add("head")

    def _block_of(self, parameter: str) -> BlockPath | None:
        return next((block for block in self.blocks if parameter.startswith(f"{block.path}.")), None)

    def _linear_sites(self) -> Iterator[Site]:
        grouped: dict[str, list[Product]] = defaultdict(list)
        for product in self.products:
            grouped[product.weight].append(product)
        for weight, uses in grouped.items():
            parts: list[Rows] = [None, *(rows for name, rows in self.roles if name == weight and rows)]
            taken: set[str] = set()
            for rows in parts:
                site = self._linear_site(weight, rows, uses)
                count = sum(name.startswith(site.name.rstrip("]")) for name in taken) if rows else 0
                taken.add(site.name)
                yield replace(site, name=f"{site.name[:-1]}{count + 1}]") if count else site

    def _linear_site(self, weight: str, rows: Rows, uses: list[Product]) -> Site:
        first = uses[0]
        roles = frozenset(self.roles.get((weight, rows), set()))
        owner = own_name(weight, module_path(first.use.op), self.aliases)
        path = owner.removesuffix(".weight") if owner.endswith(".weight") else owner.rpartition(".")[0]
        label = sorted(role.rsplit(".", 1)[-1] for role in roles)[0] if rows else ""
        whole = owner.removesuffix(".weight")
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
        )  # fmt: skip

    def _is_tied(self, weight: str) -> bool:
        """Whether something other than this linear layer reads the weight, such as an embedding."""
        (node,) = self.module.graph.find_nodes(op="get_attr", target=weight)
        return any(user.target is aten.embedding.default for user in node.users)


def _name_stacks(blocks: list[BlockPath], decoders: set[str]) -> list[BlockPath]:
    """With two stacks, the one with cross attention is the decoder; with one, there is nothing to name."""
    stacks = {block.stack for block in blocks}
    if len(stacks) != 2 or not decoders:
        return [block.named(None) for block in blocks]
    return [block.named("decoder" if block.stack in decoders else "encoder") for block in blocks]


def _further(module: fx.GraphModule, taken: set[str]) -> Iterator[Site]:
    """What the kinds of site find that have a file of their own.

    Raises:
        ValueError: where a site has the name of another, or no word of its kind.
    """
    for kind in site_kinds():
        for site in kind.find(module):
            if site.name in taken:
                raise ValueError(f"{kind.__name__}.find calls a site {site.name!r}, as another is called")
            if site.roles.isdisjoint(kind.own_roles):
                raise ValueError(f"{kind.__name__}.find gives {site.name} no role of {', '.join(kind.own_roles)}")
            taken.add(site.name)
            yield site


def _place(site: Site, blocks: list[BlockPath]) -> Site:
    """The site with its layer, stack and block filled in, from where its parameters live."""
    owner = site.parameters[0] if site.parameters else site.name
    for block in blocks:
        if owner.startswith(f"{block.path}.") or owner == block.path:
            return replace(site, layer=block.layer, stack=block.role, block=block.path)
    return site
