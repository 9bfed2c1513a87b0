"""PEFTC_DEBUG=1…5: what each pass did, told on standard error while the compiler runs.

1  seconds and inserted nodes by pass, how often each fusion fired; tracebacks from the command line
2  the plan's bindings too
3  the difference each pass made too
4  the whole graph after each pass too
5  every place where a fusion nearly fitted too
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import fx

    from peftc.optimise.fuse import Fired
    from peftc.planning.planner import Plan

VARIABLE = "PEFTC_DEBUG"


def level() -> int:
    """The level asked for; anything set that is no number counts as 1."""
    asked = os.environ.get(VARIABLE, "")
    return int(asked) if asked.isdecimal() else int(bool(asked))


def tell_plan(plan: Plan) -> None:
    """Level 2: every binding."""
    if level() >= 2:
        for binding in plan.bindings:
            _say(f"{binding.method!r} -> {binding.site.name}  ({binding.span})")


def tell_pass(name: str, seconds: float, before: fx.Graph, after: fx.Graph) -> None:
    """Level 1 and up: what a pass took and what it changed."""
    from peftc.graph.printing import as_text, diff  # needs torch, which `level` must not wait for

    if level() >= 1:
        _say(f"{name}: {seconds:.3f} s, {len(after.nodes) - len(before.nodes):+d} nodes")
    if level() >= 3:
        _say(diff(before, after))
    if level() >= 4:
        _say(as_text(after))


def tell(text: str) -> None:
    """Level 1 and up: a decision that a user may wonder about."""
    if level() >= 1:
        _say(text)


def tell_fired(fired: Sequence[Fired]) -> None:
    """Level 1: how often each fusion fired, and the nearest miss of those that did not."""
    if level() >= 1:
        for one in fired:
            _say(f"fusion {one}")


def tell_miss(rule: str, miss: str) -> None:
    """Level 5: a place where a fusion nearly fitted."""
    if level() >= 5:
        _say(f"fusion {rule} not in {miss}")


def _say(text: str) -> None:
    if text:
        print(f"[peftc] {text}", file=sys.stderr)
