"""The one place where text meets a terminal: what it says is said as it is, no word of it is a style or a picture."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from io import StringIO
from textwrap import wrap
from typing import IO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text


def screen(
    file: IO[str] | None = None, *, width: int | None = None, plain: bool = False, stderr: bool = False
) -> Console:
    """A console that takes square brackets and colons for what they are: specs, shapes and formulas have them."""
    return Console(
        file=file, width=width, stderr=stderr, markup=False, emoji=False, highlight=False,
        color_system=None if plain else "auto", legacy_windows=False if plain else None,
    )  # fmt: skip


def rendered(*items: RenderableType, width: int = 110) -> str:
    """What rich draws, as plain text."""
    buffer = StringIO()
    console = screen(buffer, width=width, plain=True)
    for item in items:
        console.print(item)
    return buffer.getvalue().rstrip("\n")


def standard() -> Console:
    """Standard output; wide enough not to cut names where it is no terminal of a known width."""
    return screen(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


def print_all(*items: RenderableType) -> None:
    """Prints to standard output."""
    console = standard()
    for item in items:
        console.print(Hung(item) if isinstance(item, str) else item)


class Hung:
    """A text whose lines go on two columns further in than where they begin."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        for line in self.text.splitlines():
            indent = " " * (len(line) - len(line.lstrip()) + 2)
            parts = wrap(
                line, options.max_width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )  # fmt: skip
            yield from (Text(part) for part in parts or [""])
