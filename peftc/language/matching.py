"""Which names a pattern matches, within a limit of time: patterns come with the files of others."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TypeVar

import regex

T = TypeVar("T")
SECONDS = 1.0  # that all matching for one specification, or one folder, may take
# A brace that is no repeat: itself in Python, while `regex` reads some of them as "about like this". What is escaped or
# in a set of characters goes by.
_BRACE = re.compile(r"(\\.|\[\^?\]?(?:\\.|[^\]\\])*\])|\{(?!\d+(?:,\d*)?\}|,\d*\})", re.DOTALL)


def compiled(pattern: str) -> regex.Pattern[str]:
    """A regular expression that is valid for `re`, with the same meaning, whose matching can be stopped."""
    return regex.compile(_BRACE.sub(lambda found: found[1] or r"\{", pattern), regex.V0)


class Clock:
    """The time that is left for matching."""

    def __init__(self) -> None:
        self.left = SECONDS

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
