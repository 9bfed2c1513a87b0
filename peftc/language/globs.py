"""Name patterns, such as `model.layers.*.mlp.{up,down}_proj`: what is wrong with one, and its regular expression."""

from __future__ import annotations

import itertools
import math
import re

MOST_ALTERNATIVES = 1000
MOST_SPELT_OUT = 100_000  # characters of all of them


def problem(pattern: str) -> tuple[int, str] | None:
    """Where and why a name pattern is bad: the offset of a character, or of the end."""
    opened = None
    for index, char in enumerate(pattern):
        if char in "?[]()|\\" or char.isspace():
            return index, f"'{char}' has no meaning here"
        if char == "{":
            if opened is not None:
                return index, "a choice inside a choice"
            opened = index
        elif char == "}":
            if opened is None:
                return index, "'}' closes nothing"
            if index == opened + 1:
                return opened, "the choice is empty"
            opened = None
        elif char == "," and opened is None:
            return index, "',' outside of a choice"
    if opened is not None:
        return opened, "'{' is never closed"
    alternatives = math.prod(map(len, _choices(pattern)))
    if alternatives > MOST_ALTERNATIVES:
        return pattern.index("{"), f"its choices make more than {MOST_ALTERNATIVES} patterns"
    if alternatives > 1 and alternatives * len(pattern) > MOST_SPELT_OUT:
        return pattern.index("{"), f"its choices make patterns of more than {MOST_SPELT_OUT:,} characters"
    start = 0
    for segment in _segments(pattern):
        if not segment:
            return start, "empty segment" if pattern else "it is empty"
        if "**" in segment and segment != "**":
            return start + segment.index("**"), "'**' must be a whole segment"
        start += len(segment) + 1
    return None


def _segments(pattern: str) -> list[str]:
    """The parts between dots; a dot inside a choice does not count."""
    return re.split(r"\.(?![^{}]*\})", pattern)


def regex(pattern: str) -> str:
    """For `fullmatch`. Matching takes polynomial time: no part is tried again once it has matched.

    Choices are spelt out. What is left between two stars may match where it first can, for the second star takes up
    whatever follows; atomic groups `(?>...)` say so.
    """
    marked = re.sub(rf"{_ANY}(\.{_ANY})+", "**", pattern).replace("**", _MARK)
    return "|".join(dict.fromkeys(map(_without_choices, map("".join, itertools.product(*_choices(marked))))))


_ANY = r"\*\*"
_MARK = "?"  # stands for `**`, which spelling out may make of two `*`; no name pattern has it


def _choices(pattern: str) -> list[list[str]]:
    """What may stand in each place: `a.{b,c}` is `a.` and then `b` or `c`."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    return [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]


def _without_choices(pattern: str) -> str:
    first, *runs = (r"\.".join(map(_segment, run.split("."))) if run else "" for run in re.split(r"\.?\?\.?", pattern))
    if not runs:
        return first
    text, dot = first, r"\." if first else ""
    for run in runs[:-1]:
        text, dot = rf"{text}{dot}(?>(?:[^.]*\.)*?{run}(?![^.]))", r"\."
    if runs[-1]:
        return rf"{text}{dot}(?:.*\.)?{runs[-1]}"
    return rf"{text}(?:\..*)?" if text else ".*"


def _segment(segment: str) -> str:
    first, *rest = map(re.escape, re.split(r"\*+", segment))
    if not rest:
        return first
    if not any((first, *rest)):
        return "[^.]+"
    return "".join([first, *(f"(?>[^.]*?{part})" for part in rest[:-1]), f"[^.]*{rest[-1]}"])
