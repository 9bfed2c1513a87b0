"""What the page's script is told: which drawing is whose, and of each node and edge what a reader may ask."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from peftc.show.picture.album import Album
from peftc.show.picture.drawing import Drawing, DrawnNode
from peftc.show.picture.svg import edge_facts, facts


def page_data(album: Album) -> str:
    """As JSON that may stand in an element of a page.

    rows      what a block is after each pass: the drawing's number and how many nodes are new there
    views     for the whole (the first) and each block: which of `rows`, and which of `places`
    drawings  of each node what its panel says, of each edge its tooltip
    places    the sites of a block, with roles, evidence, and the statements that reach them
    """
    rows: dict[tuple[tuple[int, int], ...], int] = {}
    places: dict[str, int] = {}
    views = []
    for block, looks in album.looks.items():
        row = tuple((look.drawing, look.added) for look in looks)
        known = json.dumps({name: asdict(place) for name, place in album.places(block).items()})
        views.append([rows.setdefault(row, len(rows)), places.setdefault(known, len(places))])
    told = {
        "blocks": album.blocks,
        "passes": album.passes,
        "rows": list(rows),
        "views": views,
        "drawings": [_drawing(drawing) for drawing in album.drawings],
        "places": [json.loads(text) for text in places],
    }
    safe = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}
    return json.dumps(told, separators=(",", ":"), ensure_ascii=False).translate(safe)


def _drawing(drawing: Drawing) -> dict[str, Any]:
    nodes = {node.id: node for node in drawing.nodes}
    return {
        "inserted": drawing.inserted,
        "nodes": {node.id: _node(node) for node in drawing.nodes},
        "edges": [edge_facts(edge, nodes) for edge in drawing.edges],
    }


def _node(node: DrawnNode) -> dict[str, Any]:
    """What is empty is left out."""
    every = {
        "label": node.label,
        "kind": node.kind,
        "tip": facts(node),
        "shape": node.shape,
        "state": _state(node),
        "statements": [f"{origin.place}: {origin.statement}" for origin in node.origins],
        "reads": list(node.reads),
        "pass": node.made,
        "notes": [note for note in node.notes if not note.startswith("inserted by ")],
        "sites": list(node.sites),
        "python": list(node.python),
        "source": node.source,
        "opens": node.opens,
    }
    return {name: value for name, value in every.items() if value}


def _state(node: DrawnNode) -> str:
    if node.kind == "parameter":
        whose = "inserted" if node.inserted else "of the base model"
        return f"parameter, {whose}, {'learns' if node.trainable else 'stays as it is'}"
    whose = "inserted" if node.inserted else "of the base model"
    return f"operation, {whose}" if node.kind == "operation" else node.kind
