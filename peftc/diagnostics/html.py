"""A table in HTML, for notebooks: every word in it is shown as it is."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from html import escape

_STYLE = "text-align:{};padding:2px 12px 2px 0;vertical-align:top"


def html_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], words: Container[int] = (0,)) -> str:
    """`rows` under `headings`; the columns `words` stand to the left, the others, of numbers, to the right."""

    def line(tag: str, texts: Sequence[str]) -> str:
        styles = (_STYLE.format("left" if index in words else "right") for index in range(len(texts)))
        cells = (f'<{tag} style="{style}">{escape(text)}</{tag}>' for style, text in zip(styles, texts, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    caption = f'<caption style="text-align:left;font-weight:bold">{escape(title)}</caption>'
    inside = f"{caption}<thead>{line('th', headings)}</thead><tbody>{''.join(line('td', row) for row in rows)}</tbody>"
    return f'<table style="border-collapse:collapse">{inside}</table>'
