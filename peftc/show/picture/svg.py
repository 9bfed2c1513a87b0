"""A drawing as SVG: in a page, whose script says what a node is, or as a file that stands alone."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from peftc.diagnostics.source import Span
from peftc.graph.printing import plain
from peftc.planning.plan import Plan
from peftc.show.picture.colours import HUES, file_css
from peftc.show.picture.drawing import Drawing, DrawnEdge, DrawnNode, Origin, origin_of, with_room
from peftc.show.picture.layers import BADGE, named_ports, port_width
from peftc.show.picture.layout import Layout, Route, lay_out

HEAD = 40.0  # what a file says above its drawing
BUS = 8.0  # from the node to the line that its parameters come on

Hues = Mapping[Origin, int]


def hues_of(plan: Plan) -> dict[Origin, int]:
    """A number for each statement that a node may come from, in the order of the file."""
    return {origin: index for index, origin in reversed([*enumerate(map(origin_of, plan_spans(plan)))])}


def plan_spans(plan: Plan) -> list[Span]:
    """Where the statements stand that insert something, pack, or let something learn."""
    spans = [binding.span for binding in plan.bindings] + list(plan.trained.values())
    spans += [item.span for item in plan.packed.values()]
    return sorted(dict.fromkeys(spans), key=lambda span: (span.source.name, span.start))


def to_svg(drawing: Drawing, hues: Hues, caption: str) -> str:
    """A file: the drawing under a line that says what it is; colours by day and by night, no script."""
    layout = lay_out(drawing)
    width, height = max(layout.width, 7.5 * len(caption) + 60), layout.height + HEAD
    shift = (width - layout.width) / 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(caption)}">\n'
        f"<title>{escape(caption)}</title>\n<style>{file_css()}</style>\n"
        f'<rect class="ground" width="100%" height="100%"/>\n'
        f'<text x="{width / 2:.1f}" y="28">{escape(caption)}</text>\n'
        f'<g transform="translate({shift:.1f} {HEAD:g})">\n{_Painter(drawing, layout, hues, titles=True).all()}\n</g>\n'
        "</svg>\n"
    )


def embedded(drawing: Drawing, hues: Hues, room: str = "") -> str:
    """The same for a page, which has its style. `room`: the longest name that may stand where a mark is."""
    layout = lay_out(with_room(drawing, room) if room else drawing)
    width, height = f"{layout.width:.0f}", f"{layout.height:.0f}"
    return (
        f'<svg viewBox="0 0 {width} {height}" data-width="{width}" data-height="{height}" role="group" '
        f'preserveAspectRatio="xMidYMin meet" aria-label="{escape(plain(drawing.title))}">\n'
        f"{_Painter(drawing, layout, hues, titles=False).all()}\n</svg>"
    )


class _Painter:
    def __init__(self, drawing: Drawing, layout: Layout, hues: Hues, *, titles: bool) -> None:
        self.drawing, self.layout, self.hue, self.titles = drawing, layout, hues, titles
        self.nodes = {node.id: node for node in drawing.nodes}
        self.named = named_ports(drawing)

    def all(self) -> str:
        routes = sorted(enumerate(self.layout.routes), key=lambda one: self._edge_hue(one[1].edge) is not None)
        edges = "\n".join(self._edge(route, index) for index, route in routes)
        return edges + "\n" + "\n".join(map(self._node, self.drawing.nodes))

    def _hues(self, node: DrawnNode) -> list[int]:
        return list(dict.fromkeys(self.hue[origin] for origin in node.origins if origin in self.hue))

    def _edge_hue(self, edge: DrawnEdge) -> int | None:
        """Tensors that an inserted node makes, or that go to one, have its colour."""
        for end in (self.nodes[edge.source], self.nodes[edge.target]):
            if (end.inserted or end.kind == "parameter") and len(hues := self._hues(end)) == 1:
                return hues[0]
        return None

    def _node(self, node: DrawnNode) -> str:
        box, hues = self.layout.boxes[node.id], self._hues(node)
        classes = ["node", node.kind]
        if node.inserted or node.kind == "parameter":
            classes.append("mine")
            classes.append(f"h{hues[0] % HUES}" if len(hues) == 1 else "h")
        if node.kind == "parameter":
            classes.append("learns" if node.trainable else "still")
        classes += ["opens"] if node.opens else []
        left, top = box.x - box.width / 2, box.y - box.height / 2
        radius = {"parameter": 11, "operation": 8}.get(node.kind, 15)
        badges, start = [], left + 9
        if node.kind != "parameter":
            for origin in node.origins:
                badges.append(self._badge(origin, start, box.y))
                start += BADGE
        middle = box.x + (BADGE * len(badges)) / 2
        name = f' <tspan class="name">{escape(node.name)}</tspan>' if node.name else ""
        op = f'<tspan class="op">{escape(node.op)}</tspan>' if node.kind != "parameter" else escape(node.op)
        rect = f'width="{box.width:.1f}" height="{box.height:.1f}" rx="{radius}"/>'
        under = f'<rect class="under" x="{left + 4:.1f}" y="{top + 4:.1f}" {rect}' if node.folded else ""
        about = f"<title>{escape(facts(node))}</title>" if self.titles else ""
        return (
            f'<g class="{" ".join(classes)}" role="button" aria-label="{escape(_first_line(node))}" '
            f'data-id="{escape(node.id)}" data-origin="{" ".join(map(str, hues))}">{about}{under}'
            f'<rect class="body" x="{left:.1f}" y="{top:.1f}" {rect}{"".join(badges)}'
            f'<text x="{middle:.1f}" y="{box.y + 4.2:.1f}">{op}{name}</text></g>'
        )

    def _badge(self, origin: Origin, x: float, y: float) -> str:
        hue = f" h{self.hue[origin] % HUES}" if origin in self.hue else ""
        return (
            f'<g class="badge{hue}"><rect x="{x:.1f}" y="{y - 8:.1f}" width="19" height="16" rx="5"/>'
            f'<text x="{x + 9.5:.1f}" y="{y + 3.8:.1f}">{origin.line}</text></g>'
        )

    def _edge(self, route: Route, index: int) -> str:
        edge, hue = route.edge, self._edge_hue(route.edge)
        (x, y), path = route.points[-1], _path(route)
        head = (
            f"{x},{y:.1f} {x + 6:.1f},{y - 3.5:.1f} {x + 6:.1f},{y + 3.5:.1f}"
            if route.sideways
            else f"{x:.1f},{y:.1f} {x - 3.5:.1f},{y - 6:.1f} {x + 3.5:.1f},{y - 6:.1f}"
        )
        label = _port_label(edge.argument, x, y - 14) if edge.target in self.named and not route.sideways else ""
        mine = "" if hue is None else f" mine h{hue % HUES}"
        origin = "" if hue is None else f' data-origin="{hue}"'
        about = f"<title>{escape(edge_facts(edge, self.nodes))}</title>" if self.titles else ""
        hit = "" if self.titles else f'<path class="hit" d="{path}"/>'
        return (
            f'<g class="edge{mine}" data-edge="{index}" data-from="{escape(edge.source)}" '
            f'data-to="{escape(edge.target)}"{origin}>'
            f'{about}{hit}<path class="wire" d="{path}"/><polygon points="{head}"/>{label}</g>'
        )


def _path(route: Route) -> str:
    """Through a gap between layers with vertical ends, straight down through a layer; parameters come on one line."""
    (x, y), *rest = route.points
    if route.sideways:
        (end, level), *_ = rest
        return f"M{x:.1f} {y:.1f}H{end + BUS:.1f}V{level:.1f}H{end + 5:.1f}"
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
    width = port_width(text) - 8
    return (
        f'<rect x="{x - width / 2:.1f}" y="{y - 6:.1f}" width="{width:.1f}" height="12"/>'
        f'<text x="{x:.1f}" y="{y + 3.4:.1f}">{escape(text)}</text>'
    )


def _first_line(node: DrawnNode) -> str:
    state = "inserted " if node.inserted else ""
    learns = ("trainable " if node.trainable else "frozen ") if node.kind == "parameter" else ""
    return f"{state}{learns}{node.kind} {node.label} {node.shape}".rstrip()


def facts(node: DrawnNode) -> str:
    """The tooltip: what it is, its shape, why it is there."""
    learns = {True: "learns", False: "does not learn"}[node.trainable] if node.kind == "parameter" else ""
    origins = [f"{origin.place}: {origin.statement}" for origin in node.origins]
    reads = [f"reads {weight}" for weight in node.reads]
    return "\n".join(filter(None, [node.label, node.shape, learns, *origins, *reads, *node.notes]))


def edge_facts(edge: DrawnEdge, nodes: Mapping[str, DrawnNode]) -> str:
    """The tooltip of an edge: from where, to where, what becomes of its shape on the way."""
    through = f"\nthrough {', '.join(edge.through)}" if edge.through else ""
    shape = f"\n{nodes[edge.source].shape}" if not edge.through and nodes[edge.source].shape else ""
    return f"{nodes[edge.source].label} → {nodes[edge.target].label}{shape}{through}"
