"""What prompts take of a model's positions, and what they leave to the input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from peftc.errors import Diagnostic
from peftc.model_errors import NoPositions
from peftc.site import Sequence

if TYPE_CHECKING:
    from peftc.planning import Binding


def extension(bindings: Iterable[Binding]) -> int:
    """The positions that all prompts together add to the input."""
    return sum(b.method.extends(b.site) for b in bindings if isinstance(b.site, Sequence))


def room(bindings: Iterable[Binding]) -> tuple[str, int] | None:
    """The input that counts positions and how long it may be, where prompts take some of a table's positions."""
    found = list(bindings)
    limited = [b.site for b in found if isinstance(b.site, Sequence) and b.site.positions is not None]
    return next(((site.tokens, (site.positions or 0) - extension(found)) for site in limited), None)


def too_long(bindings: Iterable[Binding]) -> Iterator[Diagnostic]:
    """An error at the first prompt with which all so far leave no position for the input."""
    taken: list[Binding] = []
    for binding in bindings:
        if isinstance(binding.site, Sequence) and binding.site.positions is not None:
            taken.append(binding)
            if extension(taken) >= binding.site.positions:
                yield NoPositions(taken=extension(taken), positions=binding.site.positions, span=binding.span)
                return
