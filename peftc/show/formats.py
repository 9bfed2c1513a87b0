"""`show`: the graph of one block or of the whole model, after any pass, as text, DOT, Mermaid, SVG or one HTML page.

`picture/artist.py` decides what is drawn, `picture/layout.py` where, `picture/svg.py` how, and `page/` is around it;
here are the formats that are laid out by others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from difflib import get_close_matches
from typing import Literal, Protocol

from torch import fx

from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.printing import as_text, diff, plain
from peftc.planning.plan import Plan
from peftc.show.errors import NotAnImage, UnknownBlock, UnknownPass
from peftc.show.page.page import to_html
from peftc.show.picture.album import Album, first_touched
from peftc.show.picture.artist import draw
from peftc.show.picture.drawing import Drawing, DrawnEdge, DrawnNode
from peftc.show.picture.svg import hues_of, to_svg

__all__ = [
    "Drawing", "DrawnEdge", "DrawnNode", "Format", "NotAnImage", "Shown", "as_text", "diff", "draw", "first_touched",
    "render_show", "to_dot", "to_html", "to_json", "to_mermaid", "to_svg", "to_text",
]  # fmt: skip

Format = Literal["text", "dot", "mermaid", "html", "svg", "json"]


class Shown(Protocol):
    """What can be drawn: a plan, and the flat graph after each pass that ran over it."""

    @property
    def plan(self) -> Plan:
        """What was to be done."""

    @property
    def history(self) -> Mapping[str, fx.Graph]:
        """The graphs by the names of the passes, in their order; the captured one is the first."""


def render_show(
    shown: Shown,
    *,
    block: str | None = None,
    after: str | None = None,
    format: Format = "text",
    detail: bool = False,
) -> str:
    """The graph after the pass `after` (by default the last), of `block` or of the whole model.

    A page has every pass and opens with `after`.

    Raises:
        PeftcError: `unknown-block` or `unknown-pass`.
    """
    plan, passes = shown.plan, list(shown.history)
    chosen = passes[-1] if after is None else after
    if chosen not in passes:
        raise PeftcError(UnknownPass(name=chosen, known=tuple(passes)))
    if block is not None and block not in plan.sites.blocks:
        near = get_close_matches(block, plan.sites.blocks, n=3, cutoff=0.3)
        raise PeftcError(UnknownBlock(name=block, model=plan.sites.model, near=tuple(near)))

    def drawing(name: str) -> Drawing:
        return draw(shown.history[name], block, plan, detail=detail, trained=name != passes[0])

    match format:
        case "html":
            return to_html(Album(plan, shown.history, detail=detail), block, chosen)
        case "svg":
            what = " ".join(filter(None, (plan.sites.model, block, f"after {chosen}")))
            return to_svg(drawing(chosen), hues_of(plan), plain(what))
        case "dot":
            return to_dot(drawing(chosen))
        case "mermaid":
            return to_mermaid(drawing(chosen))
        case "text":
            return to_text(drawing(chosen))
        case "json":
            return to_json(drawing(chosen), plan.sites.model, block, chosen, passes)


def to_json(drawing: Drawing, model: str, block: str | None, after: str, passes: list[str]) -> str:
    """The nodes and edges as data, with what they are drawn of: `block` is null for the whole model."""
    told = {"model": model, "block": block, "after": after, "passes": passes, "inserted": drawing.inserted}
    return json.dumps(told | asdict(drawing), indent=2)


# Text


def to_text(drawing: Drawing) -> str:
    """One node a line: `+` for inserted, its number, what it is, the numbers it reads, its shape, its statement."""
    number = {node.id: index for index, node in enumerate(drawing.nodes, 1)}
    reads: dict[str, list[str]] = {node.id: [] for node in drawing.nodes}
    for edge in drawing.edges:
        reads[edge.target].append(str(number[edge.source]))
    rows = [
        (
            "+" if node.inserted else " ",
            str(number[node.id]),
            _described(node),
            " ".join(dict.fromkeys(reads[node.id])),
            node.shape,
            ", ".join(origin.place for origin in node.origins),
        )
        for node in drawing.nodes
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(6)]
    lines = [f"{drawing.title}: {len(rows)} nodes, {drawing.inserted} inserted"]
    for sign, index, what, operands, shape, place in rows:
        columns = (f"{what:<{widths[2]}}", f"{operands:<{widths[3]}}", f"{shape:<{widths[4]}}", place)
        lines.append(f"{sign} {index:>{widths[1]}}  {'  '.join(columns)}".rstrip())
    return "\n".join(lines) + "\n"


def _described(node: DrawnNode) -> str:
    match node.kind:
        case "parameter":
            return f"{'parameter' if node.trainable else 'constant'} {node.label}"
        case "operation":
            return node.label
    return f"{node.kind} {node.label}"


# DOT


def to_dot(drawing: Drawing) -> str:
    """Graphviz's language; inserted nodes are green, what learns is filled."""
    lines = [
        f"digraph {_dot_text(drawing.title)} {{",
        '  graph [rankdir=TB, fontname="Helvetica", nodesep=0.3, ranksep=0.35]',
        '  node [shape=box, style="rounded,filled", fillcolor=white, color="#98a1b2"]',
        '  node [fontname="Helvetica", fontsize=11]',
        '  edge [color="#98a1b2", arrowsize=0.6, fontname="Helvetica", fontsize=9]',
    ]
    for node in drawing.nodes:
        facts = "\n".join(filter(None, (node.shape, *(f"line {o.line}: {o.statement}" for o in node.origins))))
        label = "\n".join(filter(None, (node.label, node.shape)))
        style = _DOT_STYLE[_style(node)]
        lines.append(f"  {_dot_text(node.id)} [label={_dot_text(label)}, tooltip={_dot_text(facts)}{style}]")
    for edge in drawing.edges:
        about = " ".join(filter(None, (edge.argument, *(f"→ {step}" for step in edge.through))))
        lines.append(f"  {_dot_text(edge.source)} -> {_dot_text(edge.target)} [tooltip={_dot_text(about)}]")
    return "\n".join([*lines, "}"]) + "\n"


_DOT_STYLE = {
    "operation": "",
    "input": ', fillcolor="#eef1f5"',
    "output": ', fillcolor="#eef1f5"',
    "inserted": ', fillcolor="#dcefed", color="#0f766e", penwidth=1.6',
    "learns": ', shape=oval, style=filled, fillcolor="#0f766e", color="#0f766e", fontcolor=white',
    "constant": ', shape=oval, style="dashed", color="#0f766e"',
}


def _dot_text(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


# Mermaid


def to_mermaid(drawing: Drawing) -> str:
    """A Mermaid flowchart, as GitHub draws it inside Markdown."""
    key = {node.id: f"n{index}" for index, node in enumerate(drawing.nodes)}
    lines = ["flowchart TB"]
    for node in drawing.nodes:
        parts = (node.label, node.shape, *(f"line {origin.line}" for origin in node.origins))
        label = "<br/>".join(_mermaid_text(part) for part in parts if part)
        start, end = ("(", ")") if node.kind == "operation" else ("([", "])")
        lines.append(f'  {key[node.id]}{start}"{label}"{end}:::{_style(node)}')
    lines += (f"  {key[edge.source]} --> {key[edge.target]}" for edge in drawing.edges)
    lines += (f"  classDef {name} {style}" for name, style in _MERMAID_STYLE.items())
    return "\n".join(lines) + "\n"


_MERMAID_STYLE = {
    "operation": "fill:#ffffff,stroke:#98a1b2,color:#1b2230",
    "input": "fill:#eef1f5,stroke:#98a1b2,color:#1b2230",
    "output": "fill:#eef1f5,stroke:#98a1b2,color:#1b2230",
    "inserted": "fill:#dcefed,stroke:#0f766e,color:#1b2230,stroke-width:2px",
    "learns": "fill:#0f766e,stroke:#0f766e,color:#ffffff",
    "constant": "fill:#ffffff,stroke:#0f766e,color:#1b2230,stroke-dasharray:4 3",
}


def _mermaid_text(text: str) -> str:
    """Everything that Mermaid, its Markdown or HTML could read as markup, as a character number."""
    return "".join(c if c.isalnum() or c in " .,:-_[]()" else f"#{ord(c)};" for c in text)


def _style(node: DrawnNode) -> str:
    if node.kind == "parameter":
        return "learns" if node.trainable else "constant"
    return "inserted" if node.inserted and node.kind == "operation" else node.kind
