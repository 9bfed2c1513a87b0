"""The one renderer of diagnostics: title, excerpt with carets, notes; safe to print on a terminal."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

from peftc.diagnostics.source import Label, Source, Span

_TAB_STOP = 4


_WIDEST_LINE = 140  # longer lines are cut around the caret


_KEPT_BEFORE_CARET = 50


_NARROWEST = 24  # columns of a text that is wrapped


class Renderable(Protocol):
    """What `render` needs of a diagnostic; `peftc.diagnostics.diagnostic.Diagnostic` is one."""

    code: ClassVar[str]

    @property
    def span(self) -> Span | None: ...
    @property
    def title(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def secondary(self) -> tuple[Label, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...


def render(diagnostic: Renderable, colour: bool = False, *, columns: int | None = None) -> str:
    """The diagnostic as text, with no newline at its end; `colour` adds ANSI escapes, `columns` is a terminal's width.

    The main span is underlined with `^`, secondary labels with `-`. Control and formatting characters of the
    source are replaced by visible ones: a specification can neither move the cursor of a terminal nor reorder
    what it shows.
    """
    return _rendered(diagnostic, _Paint(colour), columns, diagnostic.notes)


def render_all(diagnostics: Iterable[Renderable], colour: bool = False, *, columns: int | None = None) -> str:
    """One below the other; a note that stood below one of them is not said again."""
    told: set[str] = set()
    parts = []
    for diagnostic in diagnostics:
        parts.append(_rendered(diagnostic, _Paint(colour), columns, [n for n in diagnostic.notes if n not in told]))
        told.update(diagnostic.notes)
    return "\n\n".join(parts)


def _rendered(diagnostic: Renderable, paint: _Paint, columns: int | None, notes: Iterable[str]) -> str:
    marks = [_Mark(Label(diagnostic.span, diagnostic.label), "^")] if diagnostic.span else []
    marks += [_Mark(label, "-") for label in diagnostic.secondary]
    gutter = len(str(max((mark.label.span.end_line for mark in marks), default=1)))
    head = f"error[{diagnostic.code}]: "
    first, *more = _wrapped(diagnostic.title, columns, 2, begins=len(head))
    lines = [f"{paint.error(head[:-2])}: {paint.strong(first)}", *(f"  {paint.strong(line)}" for line in more)]
    arrow = "-->"
    for source in dict.fromkeys(mark.label.span.source for mark in marks):
        here = [mark for mark in marks if mark.label.span.source == source]
        lines.append(f"{' ' * gutter}{paint.frame(arrow)} {visible(str(here[0].label.span))}")
        lines += _excerpt(source, here, gutter, paint, columns)
        arrow = ":::"
    for note in notes:
        inner = [part for line in note.splitlines() or [""] for part in _wrapped(line, columns, gutter + 3)]
        lines.append(f"{' ' * gutter} {paint.frame('=')} {inner[0]}")
        lines += [f"{' ' * gutter}   {line}" for line in inner[1:]]
    return "\n".join(lines)


def _wrapped(text: str, columns: int | None, indent: int, *, begins: int | None = None) -> list[str]:
    """The visible text in lines that end between words, where it is longer than the terminal is wide.

    Each is to stand `indent` columns from the left, the first at `begins` if that is another place.
    """
    text = visible(text)
    if columns is None:
        return [text]
    taken = (indent if begins is None else begins) - indent
    lines = textwrap.wrap(
        text, max(columns - indent, _NARROWEST), initial_indent=" " * taken,
        subsequent_indent=" " * (len(text) - len(text.lstrip())), break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return [lines[0][taken:], *lines[1:]] if lines else [""]


@dataclass(frozen=True)
class _Paint:
    """ANSI styles, or none."""

    on: bool

    def _style(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.on and text else text

    def error(self, text: str) -> str:
        return self._style("1;31", text)

    def strong(self, text: str) -> str:
        return self._style("1", text)

    def frame(self, text: str) -> str:
        return self._style("1;34", text)

    def mark(self, sign: str, text: str) -> str:
        return self.error(text) if sign == "^" else self.frame(text)


@dataclass(frozen=True)
class _Mark:
    """A label with the sign that underlines it."""

    label: Label
    sign: str

    def strokes(self) -> Iterator[_Stroke]:
        """An underline within one line; for a longer span two, its first and last line, text at the last."""
        span, text = self.label.span, self.label.text
        if span.line == span.end_line:
            yield _Stroke(span.line, span.column - 1, span.end_column - 1, self.sign, text)
            return
        first, last = span.source.line(span.line), span.source.line(span.end_line)
        yield _Stroke(span.line, span.column - 1, max(len(first), span.column), self.sign, "")
        indent = min(len(last) - len(last.lstrip()), span.end_column - 1)
        yield _Stroke(span.end_line, indent, span.end_column - 1, self.sign, text)


@dataclass(frozen=True)
class _Stroke:
    """An underline below the characters [start, end) of one line."""

    line: int
    start: int
    end: int
    sign: str
    text: str


def _excerpt(source: Source, marks: Iterable[_Mark], gutter: int, paint: _Paint, columns: int | None) -> Iterator[str]:
    """The marked lines of one source, each followed by its underlines, `...` where lines are left out."""
    strokes = sorted((stroke for mark in marks for stroke in mark.strokes()), key=lambda stroke: stroke.line)
    shown = list(dict.fromkeys(stroke.line for stroke in strokes))
    for number, before in zip(shown, [shown[0], *shown], strict=False):
        if number > before + 1:
            yield paint.frame("...")
        below = [stroke for stroke in strokes if stroke.line == number]
        line = _Line.of(source.line(number), around=below[0].start, room=_room(columns, gutter))
        yield f"{paint.frame(f'{number:>{gutter}} |')} {line.shown}".rstrip()
        for stroke in below:
            left, right = line.column(stroke.start), line.column(stroke.end)
            underline = f"{' ' * left}{paint.mark(stroke.sign, stroke.sign * max(right - left, 1))}"
            margin = f"{' ' * gutter} {paint.frame('|')} "
            start = max(right, left + 1) + 1
            if columns is not None and start + min(len(stroke.text), _NARROWEST) > columns - gutter - 3:
                yield margin + underline  # the words stand below: beside it is no room
                start = max(0, min(left, columns - gutter - 3 - len(stroke.text)))
                words = _wrapped(stroke.text, columns, gutter + 3 + start)
            else:
                first, *words = _wrapped(stroke.text, columns, gutter + 3 + start)
                yield f"{margin}{underline} {paint.mark(stroke.sign, first)}".rstrip()
            for line_of_words in filter(None, words):
                yield f"{margin}{' ' * start}{paint.mark(stroke.sign, line_of_words)}"


def _room(columns: int | None, gutter: int) -> int:
    """Columns for a source line, with an ellipsis at either end."""
    return _WIDEST_LINE if columns is None else min(_WIDEST_LINE, max(columns - gutter - 5, _NARROWEST))


@dataclass(frozen=True)
class _Line:
    """A source line as the terminal shows it, and where on the screen each of its characters begins."""

    shown: str
    first: int
    columns: tuple[int, ...]  # of the characters from `first` on, and of the end

    @classmethod
    def of(cls, text: str, around: int, room: int = _WIDEST_LINE) -> _Line:
        first, last = 0, len(text)
        if last > room:
            first = max(0, min(around - room * _KEPT_BEFORE_CARET // _WIDEST_LINE, last - room))
            last = min(last, first + room)
        shown = "…" if first else ""
        width = len(shown)
        columns = []
        for char in text[first:last]:
            columns.append(width)
            cell = " " * (_TAB_STOP - width % _TAB_STOP) if char == "\t" else visible(char)
            shown += cell
            width += len(cell) if char == "\t" else _width(char)
        return cls(shown + ("…" if last < len(text) else ""), first, (*columns, width))

    def column(self, index: int) -> int:
        """Where a character begins on the screen; those that were cut off count as the ellipsis."""
        return self.columns[min(index - self.first, len(self.columns) - 1)] if index >= self.first else 0


def visible(text: str) -> str:
    """The text with every control or formatting character replaced by a picture one column wide."""
    return "".join(map(_picture, text))


def _picture(char: str) -> str:
    if char < " ":
        return chr(0x2400 + ord(char))
    if char == "\x7f":
        return "\u2421"
    return "\ufffd" if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") else char


def _width(char: str) -> int:
    """Terminal columns of a character: none for a combining mark, two for a wide one."""
    if unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1
