"""What prompts and prefixes take of a model's positions, and what they leave to the input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from peftc.diagnostics.diagnostic import Diagnostic
from peftc.planning.errors import NoPositions
from peftc.planning.plan import Binding, Plan, extension
from peftc.protocol.site import Attention, Sequence


def _taken(bindings: Iterable[Binding]) -> int:
    """The positions before the input's first: those of prompts, and of the longest prefix."""
    found = list(bindings)
    own = [b for b in found if isinstance(b.site, Attention) and not b.site.cross and b.site.stack != "decoder"]
    return extension(found) + max((b.method.takes_positions(b.site) for b in own), default=0)


def room(plan: Plan) -> tuple[str, int] | None:
    """The input that counts positions and how long it may be, where some of a table's positions are taken."""
    taken = _taken(plan.bindings)
    limited = [(site.tokens, site.positions) for site in plan.sites.sequences if site.positions is not None]
    return next(((tokens, positions - taken) for tokens, positions in limited if taken), None)


def too_long(bindings: Iterable[Binding]) -> Iterator[Diagnostic]:
    """An error at the first prompt with which all so far leave no position for the input."""
    found = list(bindings)
    so_far = [binding for binding in found if not isinstance(binding.site, Sequence)]
    for binding in found:
        if isinstance(binding.site, Sequence) and binding.site.positions is not None:
            so_far.append(binding)
            if _taken(so_far) >= binding.site.positions:
                yield NoPositions(taken=_taken(so_far), positions=binding.site.positions, span=binding.span)
                return
