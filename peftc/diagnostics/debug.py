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
from collections.abc import Iterable

VARIABLE = "PEFTC_DEBUG"


def level() -> int:
    """The level asked for; anything set that is no number counts as 1."""
    asked = os.environ.get(VARIABLE, "")
    return int(asked) if asked.isdecimal() else int(bool(asked))


def tell(at: int, lines: Iterable[str]) -> None:
    """Tells `lines` from level `at` on; they are made only then, where they come out of a generator."""
    if level() >= at:
        for line in lines:
            if line:
                print(f"[peftc] {line}", file=sys.stderr)
