"""By which evidence a place has its roles: the rule, and the path from an attention's operand to the linear layer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping

from torch import fx

from peftc.graph.printing import short_name
from peftc.protocol.site import Attention, Projection, Site
from peftc.protocol.sites import Sites

OPERANDS = {"q": "queries", "k": "keys", "v": "values"}
# By what the other roles are found; those of an attention have a path of their own in each model.
RULES = {
    "mlp.down": "its input is made through an activation of linear layers that read one value, its output is added to "
    "the residual stream",
    "mlp.up": "it reads what enters a feed-forward, and its output reaches the down projection",
    "mlp.gate": "it reads what enters a feed-forward, and its output is what the activation is applied to",
    "attn": "a sublayer between two additions to the residual stream, with an attention in it",
    "mlp": "a sublayer between two additions to the residual stream, with a down projection in it",
    "block": "one of several modules of one kind in a row",
}

PRODUCTS = frozenset({"linear", "addmm", "matmul", "bmm", "mm", "scaled_dot_product_attention"})

Nodes = Callable[[fx.Node], fx.Node]


def evidence(site: Site, sites: Sites, captured: Mapping[str, fx.Node] | None = None) -> Iterator[str]:
    """Why a place is what it is, a line for each reason.

    Args:
        site: the place.
        sites: all of its model.
        captured: a copy's nodes by name, where passes have changed the graph in which the places were found.
    """
    for absence in sites.absent:
        if absence.name == site.name:
            yield absence.reason
    yield from (f"{role}: {rule}" for role, rule in RULES.items() if role in site.roles)
    if not isinstance(site, Projection) or not site.uses or not any("attn." in role for role in site.roles):
        return
    known = captured or {}
    for attention in sites:
        if isinstance(attention, Attention) and attention.pattern is not None and _may_be(site, attention):
            yield from _operand(site, attention, lambda node: known.get(node.name, node))


def _may_be(site: Site, attention: Attention) -> bool:
    return None in (site.block, attention.block) or site.block == attention.block


def _operand(site: Projection, attention: Attention, at: Nodes) -> Iterator[str]:
    """The path from a linear layer to the operand of an attention that it is, or from the attention to it."""
    pattern = attention.pattern
    assert pattern is not None
    for letter, words in OPERANDS.items():
        if any(role.endswith(f"attn.{letter}") for role in site.roles):
            operand = at(getattr(pattern, letter))
            if path := _path([at(use.y) for use in site.uses], operand):
                yield f"the {words} of the attention in {attention.name} come from it: {_told(path)}"
    if any(role.endswith("attn.o") for role in site.roles) and (path := _path([at(pattern.out)], at(site.uses[0].op))):
        yield f"the first linear layer behind the attention in {attention.name}: {_told(path)}"


def _path(starts: list[fx.Node], end: fx.Node) -> list[fx.Node]:
    """The shortest way along which values flow, both ends included; empty where there is none.

    It goes through no other product: what lies behind one is that one's.
    """
    came: dict[fx.Node, fx.Node | None] = dict.fromkeys(starts)
    queue = deque(starts)
    while queue:
        node = queue.popleft()
        if node is end:
            path = [node]
            while (before := came[path[-1]]) is not None:
                path.append(before)
            return path[::-1]
        for user in node.users:
            if user not in came and (user is end or short_name(user) not in PRODUCTS):
                came[user] = node
                queue.append(user)
    return []


def _told(path: list[fx.Node]) -> str:
    return " → ".join(map(short_name, path))
