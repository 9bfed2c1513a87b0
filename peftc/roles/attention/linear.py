"""Linear attention: what queries and keys are to each other is weighed or masked, and multiplied with values as it is.

There is no softmax, so that a state of a fixed size can stand for all keys and values: delta rules (Yang et al. 2024,
arXiv:2406.06484), lightning attention (Qin et al. 2024, arXiv:2401.04658), retention (Sun et al. 2023,
arXiv:2307.08621). Over a chunk of tokens all spell out (q kᵀ * d) v, with d a decay or a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx

from peftc.graph.ir import is_tensor, value
from peftc.graph.printing import short_name
from peftc.roles.flow import SCORES
from peftc.roles.products import Product
from peftc.roles.search import Search

Rows = tuple[int, ...] | None
# Short convolutions over the tokens, by which queries, keys and values see the last few, and what delta rules make of
# values: how much each changes what is remembered already.
FURTHER = frozenset({"conv1d", "convolution", "linalg_solve_triangular", "matmul", "bmm", "cumsum"})
# What may stand between the two products: a decay or a mask, and which chunk it is.
WEIGHS = frozenset({"mul", "masked_fill", "tril", "where"})
MOVES = frozenset(
    {"select", "slice", "view", "reshape", "clone", "contiguous", "to", "neg", "unsqueeze", "squeeze", "alias"}
)


@dataclass(frozen=True)
class Weighed:
    """One linear attention: its operands, its result, and by what the products of queries and keys are weighed."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    out: fx.Node
    decays: tuple[fx.Node, ...]


def linear_attentions(graph: fx.Graph, search: Search) -> Iterator[Weighed]:
    """Every linear attention of the graph."""
    for node in graph.nodes:
        found = _scores(node)
        if found is None or node in search.products:
            continue
        q, k, *decays = found
        if q in search.features and k in search.features:
            for out, v, more in _weighed(node):
                if v in search.features:
                    yield Weighed(q, k, v, out, (*decays, *more))


def _scores(node: fx.Node) -> list[fx.Node] | None:
    """The queries and keys of which a node is the products, each with each, and by what these are weighed in it."""
    if node.target in SCORES:
        q, k = (node.args[index] for index in SCORES[node.target])
        return [q, k] if isinstance(q, fx.Node) and isinstance(k, fx.Node) else None
    if short_name(node) != "sum" or list(node.args[1:2]) != [[-1]]:
        return None
    sides = {_side(factor): factor for factor in _factors(node.all_input_nodes[0])}  # each feature has a decay
    if not {-2, -3} <= sides.keys():
        return None
    return [sides.pop(-2).all_input_nodes[0], sides.pop(-3).all_input_nodes[0], *sides.values()]


def _factors(node: fx.Node) -> Iterator[fx.Node]:
    if short_name(node) == "mul":
        for factor in node.all_input_nodes:
            yield from _factors(factor)
    else:
        yield node


def _side(node: fx.Node) -> int:
    """Which dimension a factor lacks, counted from the last; 0 where it lacks none."""
    if short_name(node) != "unsqueeze" or not isinstance(place := node.args[1], int):
        return 0
    return place if place < 0 else place - value(node).dim()


def _weighed(scores: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, tuple[fx.Node, ...]]]:
    """Products of weighed scores with values, the values, and by what the scores are weighed."""
    queue: list[tuple[fx.Node, tuple[fx.Node, ...], bool]] = [(scores, (), False)]
    seen = {scores}
    for node, decays, weighed in queue:
        for user in node.users:
            if user.target in SCORES and weighed and user.args[SCORES[user.target][0]] is node:
                v = user.args[SCORES[user.target][1]]
                if isinstance(v, fx.Node):
                    yield user, v, decays
            name = short_name(user).rstrip("_") if user.op == "call_function" else ""
            if name not in WEIGHS | MOVES or not is_tensor(user) or user in seen:
                continue
            seen.add(user)
            others = tuple(other for other in user.all_input_nodes if other is not node) if name in WEIGHS else ()
            queue.append((user, (*decays, *others), weighed or bool(others) or name == "tril"))


def linear_roles(
    graph: fx.Graph, search: Search, rows: Callable[[Product, fx.Node], tuple[int, ...]]
) -> Iterator[tuple[str, Product, Rows]]:
    """The projections of linear attentions: their letters, the layers, the rows of them.

    `rows(product, node)` are those rows of a layer that a value depends on. Where queries, keys and values go through
    one convolution, side by side, the way back leads to all of them: it is told by the numbers which is whose. Decays
    are a part of queries and keys alike, and values are remembered as what they change, which depends on keys: each
    has what the others have not.
    """
    for found in linear_attentions(graph, search):
        o = search.reader(found.out)
        if not isinstance(o, Product) or not search.joins(o.use.y):
            continue
        q, k, v = (
            {product: {*rows(product, operand)} for product in search.sources(operand)}
            for operand in (found.q, found.k, found.v)
        )
        decays: dict[Product, set[int]] = {
            product: {*rows(product, decay)}
            for decay in found.decays
            if decay in search.features
            for product in search.sources(decay)
        }
        own = {"q": _widest(q, k, decays), "k": _widest(k, q, decays), "v": _widest(v, q, k, decays)}
        known = [(letter, *each) for letter, each in own.items() if each is not None]
        if len(known) == len(own):
            yield from [("o", o, None), *known]


def _widest(own: dict[Product, set[int]], *others: dict[Product, set[int]]) -> tuple[Product, Rows] | None:
    """Of the layers that something depends on and others do not that with the most rows: heads have one decay each."""
    left = {product: rows.difference(*(other.get(product, set()) for other in others)) for product, rows in own.items()}
    product = max(left, key=lambda one: len(left[one]), default=None)
    if product is None or not (its := left[product]):
        return None
    return product, tuple(sorted(its)) if len(its) < product.n_out else None
