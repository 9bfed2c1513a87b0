"""`checkpoint SELECTOR`: blocks of which a training step keeps the input alone.

The backward pass computes all else of them again (Chen et al. 2016, arXiv:1604.06174): less memory, and one more
forward pass of these blocks. What is random is kept, so that dropout drops the same twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from peftc import language as ast
from peftc.diagnostics.diagnostic import Diagnostic
from peftc.diagnostics.source import Span
from peftc.planning.errors import WrongSite
from peftc.protocol.site import Site
from peftc.spec.resolve import Recomputing

Selecting = Callable[[ast.Selector], list[Site]]


def recomputed(wanted: Iterable[Recomputing], select: Selecting, problems: list[Diagnostic]) -> dict[str, Span]:
    """The paths of the blocks that `wanted` names, each with the statement that did; problems are added."""
    found: dict[str, Span] = {}
    for item in wanted:
        sites = select(item.target)
        if wrong := [site for site in sites if site.kind != "block"]:
            problems.append(
                WrongSite(
                    method="checkpoint", wants="block", site=wrong[0].name, site_kind=f"a {wrong[0].kind}",
                    others=len(wrong) - 1, span=item.target.span,
                )
            )  # fmt: skip
        found |= {site.path: item.span for site in sites}
    return found
