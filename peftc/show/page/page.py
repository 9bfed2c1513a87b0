"""One HTML page with every block after every pass: no network, no library, the same bytes for the same compilation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

from peftc.diagnostics.source import Source
from peftc.graph.printing import plain
from peftc.show.page.data import page_data
from peftc.show.page.legend import legend
from peftc.show.page.script import SCRIPT
from peftc.show.page.style import css
from peftc.show.picture.album import Album
from peftc.show.picture.colours import HUES
from peftc.show.picture.svg import embedded, hues_of, plan_spans

_WORDS = re.compile(
    r"(?P<em>#.*)|(?P<b>\b(?:apply|to|quantize|with|train|freeze|checkpoint|let|task|group|require|fit|using|use|in|where|except)\b)"
    r"|\"[^\"\n]*\"|."
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def to_html(album: Album, block: str | None = None, selected: str | None = None) -> str:
    """The page; it opens with `block` (None: the whole model) after the pass `selected`, by default the last."""
    return _Page(album, block, selected or album.passes[-1]).text()


class _Page:
    def __init__(self, album: Album, block: str | None, selected: str) -> None:
        self.album, self.plan, self.block, self.selected = album, album.plan, block, selected
        self.spans = plan_spans(album.plan)
        self.hues = hues_of(album.plan)

    def text(self) -> str:
        title = f"{self.block or self.plan.sites.model} · peftc"
        head = (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(plain(title))}</title>\n<style>{css()}</style>\n</head>\n"
        )
        longest = max(map(plain, self.album.blocks), key=len, default="")
        shared = "\n".join(
            f'<template id="drawing-{number}">{embedded(drawing, self.hues, longest)}</template>'
            for drawing, number in self.album.drawings.items()
        )
        body = f"<body>\n{self._header()}<main>\n{self._work()}{self._aside()}</main>\n"
        return (
            f'{head}{body}<div id="tip" role="status" hidden></div>\n{shared}\n'
            f'<script type="application/json" id="data">{page_data(self.album)}</script>\n'
            f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
        )

    # Around the drawing

    def _header(self) -> str:
        plan = self.plan
        return (
            f'<header><h1>{escape(plain(plan.sites.model))} <span id="where">{escape(plain(self.block or ""))}</span>'
            f'</h1><p class="facts"><span><b>{plan.trainable:,}</b> of {plan.total:,} parameters learn '
            f'({plan.share:.4%})</span><span id="count"></span></p></header>\n'
        )

    def _work(self) -> str:
        first = escape(self.album.passes[0])
        view = '<div class="view" tabindex="0" role="group" aria-label="{}: drag, arrow keys, + and -">{}</div>'
        image = embedded(self.album.drawn(self.block, self.selected), self.hues)
        drawn = f'<div class="panel" role="tabpanel">{image}</div>'
        return (
            f'<section class="work">\n<div class="bar">{self._steps()}{self._search()}<div class="tools">'
            f'<label><input type="checkbox" id="compare">Compare with {first}</label>'
            '<button id="farther" aria-label="Zoom out">−</button><button id="closer" aria-label="Zoom in">+</button>'
            f'<button id="fit">Fit</button></div>{self._tabs()}</div>\n'
            f'<div class="panes"><div class="pane before" hidden><h2>{first}</h2>{view.format("Before", "")}</div>'
            f'<div class="pane after"><h2>{escape(self.selected)}</h2>{view.format("After", drawn)}</div></div>'
            "</section>\n"
        )

    def _tabs(self) -> str:
        tabs = []
        for name in self.album.passes:
            chosen, idle = name == self.selected, name in self.album.idle
            tabs.append(
                f'<button role="tab" aria-selected="{str(chosen).lower()}" tabindex="{0 if chosen else -1}" '
                f'data-name="{escape(name)}"'
                + (' class="idle" title="this pass changes nothing that is drawn"' if idle else "")
                + f">{escape(name)}<small></small></button>"
            )
        count = len(self.album.idle)
        more = f'<button id="idle" aria-expanded="false">{count} changed nothing</button>' if count else ""
        return f'<div role="tablist" aria-label="Passes">{"".join(tabs)}{more}</div>'

    def _steps(self) -> str:
        names = [("whole", "the whole model"), *((str(i), name) for i, name in enumerate(self.album.blocks))]
        chosen = "whole" if self.block is None else str(self.album.blocks.index(self.block))
        options = "".join(
            f'<option value="{value}"{" selected" if value == chosen else ""}>{escape(plain(name))}</option>'
            for value, name in names
        )
        return (
            '<div class="steps"><button id="up" title="the whole model (w)">Whole</button>'
            '<button id="previous" aria-label="Block before" title="the block before ([)">&lsaquo;</button>'
            f'<select id="block" aria-label="Block">{options}</select>'
            '<button id="next" aria-label="Next block" title="the next block (])">&rsaquo;</button></div>'
        )

    def _search(self) -> str:
        return (
            '<div class="search"><input type="search" id="search" placeholder="Search" aria-label="Search nodes, '
            'weights, statements, blocks"><span id="hits" role="status"></span></div>'
        )

    def _aside(self) -> str:
        sources = dict.fromkeys([self.plan.spec.source, *(span.source for span in self.spans)])
        specs = "".join(self._spec(source) for source in sources)
        return (
            '<aside>\n<section id="panel" aria-live="polite" aria-label="The pinned node" hidden></section>\n'
            f"{specs}<h2>What learns</h2>\n{self._table()}<h2>Legend</h2>\n{legend()}"
            '<p class="keys">Click a node, or <kbd>Tab</kbd> to it and press <kbd>Enter</kbd>, to pin what is known of '
            "it; <kbd>Esc</kbd> lets go. Double click opens a block. Drag or <kbd>arrow keys</kbd> to move, "
            "<kbd>Ctrl</kbd> + wheel or <kbd>+</kbd> <kbd>−</kbd> to zoom, <kbd>0</kbd> to fit; <kbd>[</kbd> "
            "<kbd>]</kbd> step between blocks, <kbd>w</kbd> shows the whole, <kbd>/</kbd> searches.</p>\n</aside>\n"
        )

    def _spec(self, source: Source) -> str:
        lines = {
            line: index
            for index, span in reversed(list(enumerate(self.spans)))
            if span.source == source
            for line in range(span.line, span.end_line + 1)
        }
        items = []
        for number in range(1, len(source.line_starts) + 1):
            text = source.line(number)
            if number == len(source.line_starts) and not text:
                continue
            index = lines.get(number)
            mark = "" if index is None else f' class="on h{index % HUES}" data-origin="{index}" tabindex="0"'
            items.append(f"<li{mark}><i>{number}</i><code>{''.join(_coloured(text))}</code></li>")
        name = "Specification" if source.name.startswith("<") else re.split(r"[\\/]", source.name)[-1]
        return f'<h2>{escape(plain(name))}</h2>\n<ol class="spec">{"".join(items)}</ol>\n'

    def _table(self) -> str:
        rows = [(row.statement, f"{row.sites:,}", row.parameters) for row in self.plan.rows]
        body = "".join(
            f"<tr><td><code>{escape(plain(statement))}</code></td><td>{sites}</td><td>{count:,}</td>"
            f"<td>{count / self.plan.total:.3%}</td></tr>"
            for statement, sites, count in rows
        )
        return (
            "<table><thead><tr><th>Statement</th><th>Sites</th><th>Trainable</th><th>Share</th></tr></thead>\n"
            f"<tbody>{body}<tr><td>All</td><td></td><td>{self.plan.trainable:,}</td>"
            f"<td>{self.plan.share:.3%}</td></tr></tbody></table>\n"
        )


def _coloured(line: str) -> Iterator[str]:
    """A line of a spec with its comment and its words marked."""
    for found in _WORDS.finditer(line):
        text = escape(found[0].replace("\0", "\ufffd"))
        yield f"<{found.lastgroup}>{text}</{found.lastgroup}>" if found.lastgroup else text
