"""What a notebook shows of a plan or a compiled model: tables, and the first block the spec touches, folded away."""

from __future__ import annotations

from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from html import escape
from weakref import WeakKeyDictionary

from torch import fx

from peftc.diagnostics.html import html_table
from peftc.graph.printing import plain
from peftc.optimise.fuse import Fired
from peftc.planning.plan import Plan
from peftc.protocol.site import Block, Sublayer
from peftc.show.formats import Shown, first_touched, render_show
from peftc.show.picture.album import reaching_spans
from peftc.show.picture.artist import draw
from peftc.show.picture.drawing import Origin, origin_of
from peftc.show.picture.svg import hues_of, to_svg

_IMAGES: WeakKeyDictionary[fx.Graph, str] = WeakKeyDictionary()  # a graph of a history is never changed


class Report(str):
    """A text that a notebook shows as `html`."""

    html: str

    def __new__(cls, text: str, html: str) -> Report:
        report = super().__new__(cls, text)
        report.html = html
        return report

    def _repr_html_(self) -> str:
        return self.html


def report_html(plan: Plan, fired: Iterable[Fired], notes: Iterable[str]) -> str:
    """The plan's table, that of the fusions that fired or may interest, and the notes."""
    told = [one for one in fired if one.count or one.telling]
    rows = [[one.rule, f"{one.count:,}", f"{one.places:,}", "" if one.count else one.missed] for one in told]
    shown = slice(4 if any(missed for *_, missed in rows) else 3)  # no column without a word in it
    headings = ("rule", "fired", "places", "nearest miss")[shown]
    fusions = html_table("fusions", headings, [row[shown] for row in rows], (0, 3)) if rows else ""
    return plan._repr_html_() + fusions + "".join(f"<p>{escape(note)}</p>" for note in notes)


def image_html(shown: Shown) -> str:
    """The first block that the spec touches, or the whole model where it touches none, after the last pass.

    As an element of its own, whose style is not that of other drawings in the notebook.
    """
    last = list(shown.history.values())[-1]
    if last not in _IMAGES:
        block = first_touched(shown.plan)
        _IMAGES[last] = _folded(shown.plan, block, render_show(shown, block=block, format="svg"))
    return _IMAGES[last]


def plan_image(plan: Plan) -> str:
    """The first block that the spec touches, as it was captured: with each operation the lines that reach it."""
    graph = plan.captured.module.graph
    if graph not in _IMAGES:
        block = first_touched(plan)
        drawing = draw(graph, block, plan, trained=False)
        reaching: dict[str, dict[Origin, None]] = defaultdict(dict)
        for name, span in reaching_spans(plan):
            reaching[name][origin_of(span)] = None
        parameters = {site.name: () if isinstance(site, Block | Sublayer) else site.parameters for site in plan.sites}
        nodes = []
        for node in drawing.nodes:
            names = [name for site in node.sites for name in (site, *parameters.get(site, ()))]
            origins = tuple(dict.fromkeys(origin for name in names for origin in reaching[name]))
            nodes.append(replace(node, origins=origins) if node.kind == "operation" else node)
        what = " ".join(filter(None, (plan.sites.model, block)))
        svg = to_svg(replace(drawing, nodes=tuple(nodes)), hues_of(plan), plain(what))
        _IMAGES[graph] = _folded(plan, block, svg)
    return _IMAGES[graph]


def _folded(plan: Plan, block: str | None, svg: str) -> str:
    what = f"picture of {block}, the first block that the spec touches" if block else f"picture of {plan.sites.model}"
    called, image = escape(what), b64encode(svg.encode()).decode()
    element = f'<img alt="{called}" style="max-width:100%" src="data:image/svg+xml;base64,{image}">'
    return f"<details><summary>{called}</summary>{element}</details>"
