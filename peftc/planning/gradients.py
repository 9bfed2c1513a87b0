"""What may not learn: whatever stands below a method through which no gradient passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from peftc.diagnostics.diagnostic import Diagnostic
from peftc.diagnostics.source import Span
from peftc.planning.errors import GradientClaimed
from peftc.planning.plan import Binding
from peftc.protocol.site import Block, Site


def never_learning(graph: fx.Graph, bindings: Sequence[Binding], trained: dict[str, Span]) -> Iterator[Diagnostic]:
    """An error for each statement that waits for a gradient which a method of another keeps from it."""
    claims = [one for one in bindings if one.method.claims_upstream()]
    seen: set[tuple[Span, Span]] = set()
    for one in {(claim.statement, claim.site.block): claim for claim in claims if _is_end(claim.site)}.values():
        below = _below(one.site)
        others = [b.span for b in bindings if b.statement != one.statement and not below.isdisjoint(b.site.changes())]
        others += [span for name, span in trained.items() if _reads(graph, below, name)]
        for other in others:
            if (one.span, other) not in seen:
                seen.add((one.span, other))
                reason = one.method.claims_upstream() or ""
                yield GradientClaimed(method=one.method.name, reason=reason, other=other, span=one.span)


def _is_end(site: Site) -> bool:
    """Whether nothing of its chain stands above the site."""
    return not isinstance(site, Block) or site.after is None


def _below(site: Site) -> set[fx.Node]:
    """What leaves the site, and every node that depends on."""
    seen = set(site.changes())
    queue = [*seen]
    while queue:
        fresh = [node for node in queue.pop().all_input_nodes if node not in seen]
        seen.update(fresh)
        queue += fresh
    return seen


def _reads(graph: fx.Graph, nodes: set[fx.Node], parameter: str) -> bool:
    return any(node in nodes for node in graph.find_nodes(op="get_attr", target=parameter))
