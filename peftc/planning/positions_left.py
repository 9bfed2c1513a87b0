"""What prompts and prefixes take of a model's positions, and what they leave to the input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from peftc.diagnostics.diagnostic import Diagnostic
from peftc.planning.errors import NoPositions
from peftc.planning.plan import Binding, Plan, extension
from peftc.protocol.site import Attention, Sequence


def _taken(bindings: Iterable[Binding]) -> int:
    """The positions before the input's first: those of prompts, and of the longest prefixes."""
    found = list(bindings)
    own = [b for b in found if isinstance(b.site, Attention) and not b.site.cross and b.site.stack != "decoder"]
    return extension(found) + max(_prefixes(own).values(), default=0)


def _prefixes(bindings: Iterable[Binding]) -> Counter[str]:
    """The positions that prefixes take, by attention."""
    taken: Counter[str] = Counter()
    for binding in bindings:
        taken[binding.site.name] += binding.method.takes_positions(binding.site)
    return taken


def room(plan: Plan) -> tuple[str, int] | None:
    """The input that counts positions and how long it may be, where some of a table's positions are taken."""
    taken = _taken(plan.bindings)
    limited = [(site.tokens, site.positions) for site in plan.sites.sequences if site.positions is not None]
    return next(((tokens, positions - taken) for tokens, positions in limited if taken), None)


def too_long(bindings: Iterable[Binding]) -> Iterator[Diagnostic]:
    """An error at the first prefix or prompt with which all so far leave no position for the input."""
    found = list(bindings)
    prefixes: list[Binding] = []
    for binding in found:
        if isinstance(binding.site, Attention) and not binding.site.cross and binding.site.positions is not None:
            prefixes.append(binding)
            taken = _prefixes(prefixes)[binding.site.name]
            if taken >= binding.site.positions:
                yield NoPositions(taken=taken, positions=binding.site.positions, span=binding.span)
                return
    so_far = [binding for binding in found if not isinstance(binding.site, Sequence)]
    for binding in found:
        if isinstance(binding.site, Sequence) and binding.site.positions is not None:
            so_far.append(binding)
            if _taken(so_far) >= binding.site.positions:
                yield NoPositions(taken=_taken(so_far), positions=binding.site.positions, span=binding.span)
                return
