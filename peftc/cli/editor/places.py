"""Characters of a source, and the lines and columns by which an editor knows them."""

from __future__ import annotations

from typing import NamedTuple

from peftc.diagnostics.source import Source, Span

WIDTHS = {"utf-8": 1, "utf-16": 2, "utf-32": 4}  # bytes of what a column is in each encoding


class Place(NamedTuple):
    """Both count from 0; a column is as wide as the encoding that the editor chose has it."""

    line: int
    column: int


def place(source: Source, offset: int, encoding: str) -> Place:
    """Where a character is."""
    line, column = source.position(offset)
    return Place(line - 1, _width(source.text[offset - column + 1 : offset], encoding))


def offset(source: Source, where: Place, encoding: str) -> int:
    """Which character is there, or the nearest one of its line."""
    if where.line >= len(source.line_starts):
        return len(source.text)
    start, line = source.line_starts[where.line], source.line(where.line + 1)
    count = 0
    for index, character in enumerate(line):
        if count >= where.column:
            return start + index
        count += _width(character, encoding)
    return start + len(line)


def both(span: Span, encoding: str) -> tuple[Place, Place]:
    """The start and the end of a span."""
    return place(span.source, span.start, encoding), place(span.source, span.end, encoding)


def _width(text: str, encoding: str) -> int:
    return len(text.encode(f"{encoding}-le" if encoding != "utf-8" else encoding, "surrogatepass")) // WIDTHS[encoding]
