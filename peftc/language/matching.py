"""Which names a pattern matches, within a limit of time: patterns come with the files of others."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from peftc.diagnostics.lazy import Lazy

if TYPE_CHECKING:
    import regex
else:
    regex = Lazy("regex")

T = TypeVar("T")
SECONDS = 1.0  # that all matching for one specification may take
LONGEST = 1 << 17  # characters of one pattern of a folder's: making it cannot be stopped, and takes about a second
# A brace that is no repeat: itself in Python, while `regex` reads some of them as "about like this". What is escaped or
# in a set of characters goes by.
_BRACE = re.compile(r"(\\.|\[\^?\]?(?:\\.|[^\]\\])*\])|\{(?!\d+(?:,\d*)?\}|,\d*\})", re.DOTALL)


def compiled(pattern: str) -> regex.Pattern[str]:
    """A regular expression that is valid for `re`, with the same meaning, whose matching can be stopped."""
    return regex.compile(_BRACE.sub(lambda found: found[1] or r"\{", pattern), regex.V0)


class Clock:
    """The time that is left for matching, of some seconds in all."""

    def __init__(self, seconds: float | None = None) -> None:
        """`seconds`: those of one specification if None."""
        self.left = SECONDS if seconds is None else seconds

    def compiled(self, pattern: str) -> regex.Pattern[str]:
        """As `compiled`, whose time counts, too.

        Raises:
            TimeoutError: when the time is over.
            ValueError: where the pattern is too long to begin.
        """
        if self.left <= 0:
            raise TimeoutError
        if len(pattern) > LONGEST:
            raise ValueError(f"a pattern of {len(pattern):,} characters, where peftc takes {LONGEST:,}")
        began = time.monotonic()
        try:
            return compiled(pattern)
        finally:
            self.left -= time.monotonic() - began

    def found(self, pattern: regex.Pattern[str], name: str) -> bool:
        """Whether `pattern` is found in `name`.

        Raises:
            TimeoutError: when the time is over.
        """
        return self.timed(pattern.search, name) is not None

    def timed(self, match: Callable[..., T], name: str) -> T:
        """What a pattern's own `match`, `fullmatch` or `search` says of `name`.

        Raises:
            TimeoutError: when the time is over.
        """
        began = time.monotonic()
        try:
            return match(name, timeout=max(self.left, 0))
        finally:
            self.left -= time.monotonic() - began
