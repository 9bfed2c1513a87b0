"""One HTML page with the drawings of every stage: no network, no library, the same bytes for the same compilation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

from peftc.diagnostics.source import Source
from peftc.graph.printing import plain
from peftc.planning.plan import Plan
from peftc.show.drawing import Drawing, DrawnEdge, DrawnNode, Origin, origin_of
from peftc.show.layers import BADGE, named_ports
from peftc.show.layout import Layout, Route, lay_out
from peftc.show.style import CSS, SCRIPT

HUES = 8
Stages = list[tuple[str, Drawing]]

_WORDS = re.compile(
    r"(?P<em>#.*)|(?P<b>\b(?:apply|to|quantize|with|train|freeze|checkpoint|let|task|group|require|use|in|where|except)\b)"
    r"|\"[^\"\n]*\"|."
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def to_html(stages: Stages, plan: Plan, selected: str | None = None) -> str:
    """The page; `selected` is the stage it opens with, by default the last."""
    return _Page(stages, plan, selected or stages[-1][0]).text()


class _Page:
    def __init__(self, stages: Stages, plan: Plan, selected: str) -> None:
        self.stages, self.plan, self.selected = stages, plan, selected
        spans = [binding.span for binding in plan.bindings] + list(plan.trained.values())
        self.spans = sorted(dict.fromkeys(spans), key=lambda span: (span.source.name, span.start))
        self.hue = {origin_of(span): index for index, span in reversed(list(enumerate(self.spans)))}

    def text(self) -> str:
        title = f"{self.stages[-1][1].title} · peftc"
        head = (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        )
        body = f"<body>\n{self._header()}<main>\n{self._work()}{self._aside()}</main>\n"
        return f'{head}{body}<div id="tip" role="status" hidden></div>\n<script>{SCRIPT}</script>\n</body>\n</html>\n'

    # Around the drawing

    def _header(self) -> str:
        drawing, plan = self.stages[-1][1], self.plan
        model = plain(plan.sites.model)
        where = "" if drawing.title == plan.sites.model else f" <span>{escape(plain(drawing.title))}</span>"
        return (
            f'<header><h1>{escape(model)}{where}</h1><p class="facts">'
            f"<span><b>{plan.trainable:,}</b> of {plan.total:,} parameters learn ({plan.share:.4%})</span>"
            f"<span><b>{drawing.inserted}</b> of {len(drawing.nodes)} nodes inserted here</span></p></header>\n"
        )

    def _work(self) -> str:
        numbers: dict[Drawing, int] = {}
        tabs, panels = [], []
        previous: Drawing | None = None
        for name, drawing in self.stages:
            chosen = name == self.selected
            if drawing not in numbers:
                numbers[drawing] = len(numbers)
            number = numbers[drawing]
            added = len({node.id for node in drawing.nodes} - {node.id for node in (previous or drawing).nodes})
            same = previous == drawing
            note = f"<small>+{added}</small>" if added else ""
            tabs.append(
                f'<button role="tab" aria-selected="{str(chosen).lower()}" aria-controls="panel-{number}" '
                f'tabindex="{0 if chosen else -1}" data-name="{escape(name)}"'
                + (' class="same" title="this pass changes nothing here"' if same else "")
                + f">{escape(name)}{note}</button>"
            )
            previous = drawing
        opened = numbers[dict(self.stages)[self.selected]]
        for drawing, number in numbers.items():
            hidden = "" if number == opened else " hidden"
            panels.append(f'<div class="panel" role="tabpanel" id="panel-{number}"{hidden}>{self._svg(drawing)}</div>')
        view = '<div class="view" tabindex="0" role="group" aria-label="{}: drag, arrow keys, + and -">'
        first = escape(self.stages[0][0])
        return (
            '<section class="work">\n<div class="bar"><div role="tablist" aria-label="Passes">'
            + "".join(tabs)
            + '</div><div class="tools">'
            f'<label><input type="checkbox" id="compare">Compare with {first}</label>'
            '<button id="farther" aria-label="Zoom out">−</button><button id="closer" aria-label="Zoom in">+</button>'
            '<button id="whole">Fit</button></div></div>\n'
            f'<div class="panes"><div class="pane before" hidden><h2>{first}</h2>{view.format("Before")}</div></div>'
            f'<div class="pane after"><h2>{escape(self.selected)}</h2>{view.format("After")}\n'
            + "\n".join(panels)
            + "\n</div></div></div></section>\n"
        )

    def _aside(self) -> str:
        sources = dict.fromkeys([self.plan.spec.source, *(span.source for span in self.spans)])
        specs = "".join(self._spec(source) for source in sources)
        return (
            f"<aside>\n{specs}<h2>What learns</h2>\n{self._table()}<h2>Legend</h2>\n{self._legend()}"
            '<p class="keys">Drag or <kbd>arrow keys</kbd> to move, <kbd>Ctrl</kbd> + wheel or <kbd>+</kbd> '
            "<kbd>−</kbd> to zoom, <kbd>0</kbd> to fit. Point at a node for its shape and statement.</p>\n</aside>\n"
        )

    def _spec(self, source: Source) -> str:
        hues = {
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
            index = hues.get(number)
            mark = "" if index is None else f' class="on h{index % HUES}" data-origin="{index}"'
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

    def _legend(self) -> str:
        def sample(kind: str, text: str, width: int = 62, height: int = 22) -> str:
            return (
                f'<svg width="66" height="26" aria-hidden="true"><g class="node {kind}"><rect class="body" x="2" y="'
                f'{13 - height / 2:g}" width="{width}" height="{height}"/><text x="33" y="13.5">{text}</text></g></svg>'
            )

        badge = '<tspan class="op">op</tspan>'
        entries = [
            (sample("operation", badge), "operation of the model, with the frozen weight it reads"),
            (sample("operation mine h0", badge), "inserted by peftc; the number is its line in the specification"),
            (sample("parameter learns h0", "A"), "parameter that learns"),
            (sample("parameter still h0", "A"), "inserted tensor that stays as it is"),
            (sample("input", "x"), "enters or leaves what is drawn"),
        ]
        return f'<ul class="legend">{"".join(f"<li>{image}<span>{text}</span></li>" for image, text in entries)}</ul>\n'

    # The drawing

    def _svg(self, drawing: Drawing) -> str:
        layout = lay_out(drawing)
        nodes = {node.id: node for node in drawing.nodes}
        routes = sorted(layout.routes, key=lambda route: self._edge_hue(route.edge, nodes) is not None)
        named = named_ports(drawing)
        edges = "\n".join(self._edge(route, nodes, route.edge.target in named) for route in routes)
        boxes = "\n".join(self._node(node, layout) for node in drawing.nodes)
        width, height = f"{layout.width:.0f}", f"{layout.height:.0f}"
        return (
            f'<svg viewBox="0 0 {width} {height}" data-width="{width}" data-height="{height}" role="group" '
            f'preserveAspectRatio="xMidYMin meet" aria-label="{escape(plain(drawing.title))}">\n'
            f"{edges}\n{boxes}\n</svg>"
        )

    def _hues(self, node: DrawnNode) -> list[int]:
        return list(dict.fromkeys(self.hue[origin] for origin in node.origins if origin in self.hue))

    def _edge_hue(self, edge: DrawnEdge, nodes: dict[str, DrawnNode]) -> int | None:
        """Tensors that an inserted node makes, or that go to one, have its colour."""
        for end in (nodes[edge.source], nodes[edge.target]):
            if (end.inserted or end.kind == "parameter") and len(hues := self._hues(end)) == 1:
                return hues[0]
        return None

    def _node(self, node: DrawnNode, layout: Layout) -> str:
        box, hues = layout.boxes[node.id], self._hues(node)
        classes = ["node", node.kind]
        if node.inserted or node.kind == "parameter":
            classes.append("mine")
            classes.append(f"h{hues[0] % HUES}" if len(hues) == 1 else "h")
        if node.kind == "parameter":
            classes.append("learns" if node.trainable else "still")
        left = box.x - box.width / 2
        badges, start = [], left + 9
        if node.kind != "parameter":
            for origin in node.origins:
                badges.append(self._badge(origin, start, box.y))
                start += BADGE
        middle = box.x + (BADGE * len(badges)) / 2
        name = f' <tspan class="name">{escape(node.name)}</tspan>' if node.name else ""
        op = f'<tspan class="op">{escape(node.op)}</tspan>' if node.kind != "parameter" else escape(node.op)
        focus = ' tabindex="0"' if "mine" in classes else ""
        return (
            f'<g class="{" ".join(classes)}" role="img" aria-label="{escape(_first_line(node))}"{focus} '
            f'data-id="{escape(node.id)}" data-origin="{" ".join(map(str, hues))}">'
            f"<title>{escape(_facts(node))}</title>"
            f'<rect class="body" x="{left:.1f}" y="{box.y - box.height / 2:.1f}" width="{box.width:.1f}" '
            f'height="{box.height:.1f}"/>{"".join(badges)}'
            f'<text x="{middle:.1f}" y="{box.y + 0.5:.1f}">{op}{name}</text></g>'
        )

    def _badge(self, origin: Origin, x: float, y: float) -> str:
        hue = f" h{self.hue[origin] % HUES}" if origin in self.hue else ""
        return (
            f'<g class="badge{hue}"><rect x="{x:.1f}" y="{y - 8:.1f}" width="19" height="16"/>'
            f'<text x="{x + 9.5:.1f}" y="{y + 0.5:.1f}">{origin.line}</text></g>'
        )

    def _edge(self, route: Route, nodes: dict[str, DrawnNode], named: bool) -> str:
        edge, hue = route.edge, self._edge_hue(route.edge, nodes)
        (x, y), path = route.points[-1], _path(route)
        head = (
            f"{x},{y:.1f} {x + 6:.1f},{y - 3.5:.1f} {x + 6:.1f},{y + 3.5:.1f}"
            if route.sideways
            else f"{x:.1f},{y:.1f} {x - 3.5:.1f},{y - 6:.1f} {x + 3.5:.1f},{y - 6:.1f}"
        )
        label = _port_label(edge.argument, x, y - 14) if named else ""
        mine = "" if hue is None else f" mine h{hue % HUES}"
        origin = "" if hue is None else f' data-origin="{hue}"'
        through = f"\nthrough {', '.join(edge.through)}" if edge.through else ""
        shape = f"\n{nodes[edge.source].shape}" if not edge.through and nodes[edge.source].shape else ""
        about = f"{nodes[edge.source].label} → {nodes[edge.target].label}{shape}{through}"
        return (
            f'<g class="edge{mine}" data-from="{escape(edge.source)}" data-to="{escape(edge.target)}"{origin}>'
            f'<title>{escape(about)}</title><path class="hit" d="{path}"/><path class="wire" d="{path}"/>'
            f'<polygon points="{head}"/>{label}</g>'
        )


def _path(route: Route) -> str:
    """Through a gap between layers with vertical ends, straight down through a layer."""
    (x, y), *rest = route.points
    if route.sideways:
        (end, _), *_ = rest
        return f"M{x:.1f} {y:.1f}H{end + 5:.1f}"
    steps = [f"M{x:.1f} {y:.1f}"]
    for index, (next_x, next_y) in enumerate(rest):
        stop = next_y - 5 if index == len(rest) - 1 else next_y
        if index % 2 or abs(next_x - x) < 0.5:
            steps.append(f"L{next_x:.1f} {stop:.1f}")
        else:
            half = (y + stop) / 2
            steps.append(f"C{x:.1f} {half:.1f} {next_x:.1f} {half:.1f} {next_x:.1f} {stop:.1f}")
        x, y = next_x, stop
    return "".join(steps)


def _port_label(text: str, x: float, y: float) -> str:
    """The operand's name on its edge, just above the node."""
    width = 6.1 * len(text) + 4
    return (
        f'<rect x="{x - width / 2:.1f}" y="{y - 6:.1f}" width="{width:.1f}" height="12"/>'
        f'<text x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
    )


def _first_line(node: DrawnNode) -> str:
    state = "inserted " if node.inserted else ""
    learns = ("trainable " if node.trainable else "frozen ") if node.kind == "parameter" else ""
    return f"{state}{learns}{node.kind} {node.label} {node.shape}".rstrip()


def _facts(node: DrawnNode) -> str:
    """The tooltip: what it is, its shape, why it is there."""
    learns = {True: "learns", False: "does not learn"}[node.trainable] if node.kind == "parameter" else ""
    origins = [f"{origin.place}: {origin.statement}" for origin in node.origins]
    return "\n".join(filter(None, [node.label, node.shape, learns, *origins, *node.notes]))


def _coloured(line: str) -> Iterator[str]:
    """A line of a spec with its comment and its words marked."""
    for found in _WORDS.finditer(line):
        text = escape(found[0].replace("\0", "\ufffd"))
        yield f"<{found.lastgroup}>{text}</{found.lastgroup}>" if found.lastgroup else text
