"""What the marks of a drawing mean, each with a sample."""

from __future__ import annotations


def legend() -> str:
    """As a list."""
    op = '<tspan class="op">op</tspan>'
    badge = '<g class="badge h0"><rect x="8" y="5" width="17" height="16" rx="5"/><text x="16.5" y="16.8">2</text></g>'
    entries = {
        _box("operation", op): "operation of the model, with the frozen weight that it reads",
        _box("operation", op, under=True): "several as one: a module, rotary positions, arithmetic of positions",
        _box("operation mine h0", op, badge, middle=41): "inserted, with number and colour of its line in the spec",
        _box("operation mine h", op): "inserted for no single line: a fusion of the model's own, or for several lines",
        _box("parameter mine learns h0", "A"): "parameter that learns, beside the operation that reads it",
        _box("parameter mine still h0", "A"): "inserted tensor that stays as it is",
        _box("input", '<tspan class="op">x</tspan>', radius=11): "enters or leaves what is drawn",
        _edge(""): "a tensor goes from one to the other, through views and casts",
        _edge(" mine h0"): "a tensor that an inserted operation reads or makes",
        _edge("", "query"): "which operand it is there, where there are three and more",
        _box("operation found", op): "found by a search",
        _box("operation pinned", op): "pinned: what is known of it stands above",
    }
    items = "".join(f"<li>{image}<span>{text}</span></li>" for image, text in entries.items())
    return f'<ul class="legend">{items}</ul>\n'


def _box(kind: str, text: str, before: str = "", *, middle: int = 33, radius: int = 8, under: bool = False) -> str:
    rect = f'width="60" height="22" rx="{11 if "parameter" in kind else radius}"/>'
    behind = f'<rect class="under" x="6" y="6" {rect}' if under else ""
    return _svg(
        f'<g class="node {kind}">{behind}<rect class="body" x="2" y="2" {rect}{before}'
        f'<text x="{middle}" y="17.2">{text}</text></g>'
    )


def _edge(kind: str, name: str = "") -> str:
    label = f'<rect x="14" y="1" width="38" height="12"/><text x="33" y="10.4">{name}</text>' if name else ""
    wire = f'<path class="wire" d="M33 {13 if name else 1}V23"/><polygon points="33,28 29.5,22 36.5,22"/>'
    return _svg(f'<g class="edge{kind}">{wire}{label}</g>')


def _svg(inside: str) -> str:
    return f'<svg width="70" height="30" aria-hidden="true">{inside}</svg>'
