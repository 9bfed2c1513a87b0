"""Where each node of a drawing goes: layers from top to bottom, few crossings, straight long edges.

Sugiyama's method: layers by longest path, a bend point wherever an edge passes a layer, an order within each layer by
barycentres, then positions that are nearest to the neighbours' in the least-squares sense. Parameters stand to the
right of the node that reads them and move with it. Lengths are in CSS pixels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import networkx as nx

from peftc.drawing import Drawing, DrawnEdge, DrawnNode

LETTER, SMALL_LETTER = 7.25, 6.65  # widths in a 12 and an 11 pixel monospaced font
HEIGHT, PILL = 30.0, 22.0
BADGE = 24.0
ACROSS, STEP, PILL_GAP = 26.0, 26.0, 16.0
MARGIN = 28.0
SWEEPS = 16

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Box:
    """A node's rectangle: the centre and the size."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Route:
    """An edge's way: from point to point, alternately through a gap between layers and straight through a layer."""

    edge: DrawnEdge
    points: tuple[Point, ...]
    sideways: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """A drawing with coordinates, all of them positive."""

    width: float
    height: float
    boxes: dict[str, Box]
    routes: tuple[Route, ...]


@dataclass(eq=False)
class _Item:
    """A node with its parameters, or the point where long edges pass a layer. `left` and `right` are from `x`."""

    key: str
    rank: int
    left: float = 5.0
    right: float = 5.0
    height: float = 0.0
    node: DrawnNode | None = None
    pills: list[DrawnNode] = field(default_factory=list)
    x: float = 0.0
    above: list[_Item] = field(default_factory=list)
    below: list[_Item] = field(default_factory=list)


def width_of(node: DrawnNode) -> float:
    """The width its label needs; a badge for each statement comes before it."""
    if node.kind == "parameter":
        return len(node.label) * SMALL_LETTER + 20
    return len(node.label) * LETTER + 26 + BADGE * len(node.origins)


def lay_out(drawing: Drawing) -> Layout:
    """Coordinates for every node and edge of `drawing`."""
    return _Layout(drawing).run()


class _Layout:
    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing
        self.items: dict[str, _Item] = {}
        self.chains: dict[DrawnEdge, list[_Item]] = {}
        self.layers: list[list[_Item]] = []

    def run(self) -> Layout:
        if not self.drawing.nodes:
            return Layout(2 * MARGIN, 2 * MARGIN, {}, ())
        self._rank()
        self._bend()
        self._order()
        self._place()
        return self._coordinates()

    def _rank(self) -> None:
        """Longest path from the inputs; what nothing precedes then moves down to just above its first reader."""
        beside = self._beside()
        flow: nx.DiGraph[str] = nx.DiGraph()
        flow.add_nodes_from(node.id for node in self.drawing.nodes if node.id not in beside)
        flow.add_edges_from((e.source, e.target) for e in self.drawing.edges if e.source not in beside)
        rank: dict[str, int] = {}
        order = list(nx.lexicographical_topological_sort(flow, {n: i for i, n in enumerate(flow)}.__getitem__))
        for key in order:
            rank[key] = max((rank[before] + 1 for before in flow.predecessors(key)), default=0)
        for key in reversed(order):
            if not flow.in_degree(key) and flow.out_degree(key):
                rank[key] = min(rank[after] for after in flow.successors(key)) - 1
        by_id = {node.id: node for node in self.drawing.nodes}
        for key in order:
            half = width_of(by_id[key]) / 2
            self.items[key] = _Item(key, rank[key], half, half, HEIGHT, by_id[key])
        for pill, owner in beside.items():
            item = self.items[owner]
            item.pills.append(by_id[pill])
            item.right = max(item.right, width_of(by_id[owner]) / 2 + PILL_GAP + width_of(by_id[pill]))
            item.height = max(HEIGHT, len(item.pills) * (PILL + 5) - 5)

    def _beside(self) -> dict[str, str]:
        """Parameters that a single node reads."""
        readers: dict[str, set[str]] = defaultdict(set)
        for edge in self.drawing.edges:
            readers[edge.source].add(edge.target)
        parameters = [node.id for node in self.drawing.nodes if node.kind == "parameter"]
        return {key: min(readers[key]) for key in parameters if len(readers[key]) == 1}

    def _bend(self) -> None:
        """Long edges of one source share their bend points, those to inserted nodes and to others apart."""
        inserted = {node.id for node in self.drawing.nodes if node.inserted}
        bends: dict[tuple[str, bool, int], _Item] = {}
        links: dict[tuple[int, int], tuple[_Item, _Item]] = {}
        for edge in self.drawing.edges:
            source, target = self.items.get(edge.source), self.items[edge.target]
            if source is None:
                continue
            chain = [source]
            for rank in range(source.rank + 1, target.rank):
                key = (edge.source, edge.target in inserted, rank)
                chain.append(bends.setdefault(key, _Item(f"{edge.source} {rank}", rank)))
            chain.append(target)
            self.chains[edge] = chain
            for upper, lower in zip(chain, chain[1:], strict=False):
                links[id(upper), id(lower)] = (upper, lower)
        for upper, lower in links.values():
            upper.below.append(lower)
            lower.above.append(upper)
        every = [*self.items.values(), *bends.values()]
        self.layers = [[] for _ in range(1 + max(item.rank for item in every))]
        for item in every:
            self.layers[item.rank].append(item)

    def _order(self) -> None:
        """Barycentre sweeps down and up; the order with the fewest crossings is kept."""
        self._start()
        best, fewest = [list(layer) for layer in self.layers], self._crossings()
        for sweep in range(SWEEPS):
            if not fewest:
                break
            downward = sweep % 2 == 0
            for layer in self.layers if downward else reversed(self.layers):
                self._by_barycentre(layer, downward)
            if (now := self._crossings()) < fewest:
                best, fewest = [list(layer) for layer in self.layers], now
        self.layers = best

    def _start(self) -> None:
        """The order in which a walk from the outputs meets the nodes: operands stand as they are written."""
        seen: dict[_Item, None] = {}
        for last in reversed([item for layer in self.layers for item in layer if not item.below]):
            waiting = [last]
            while waiting:
                item = waiting.pop()
                if item not in seen:
                    seen[item] = None
                    waiting.extend(reversed(item.above))
        place = {item: index for index, item in enumerate(seen)}
        for layer in self.layers:
            layer.sort(key=place.__getitem__)

    def _by_barycentre(self, layer: list[_Item], downward: bool) -> None:
        place = {item: index for other in self.layers for index, item in enumerate(other)}

        def centre(item: _Item) -> float:
            around = item.above if downward else item.below
            return sum(place[other] for other in around) / len(around) if around else float(place[item])

        layer.sort(key=centre)

    def _crossings(self) -> int:
        total = 0
        for upper, lower in zip(self.layers, self.layers[1:], strict=False):
            place = {item: index for index, item in enumerate(lower)}
            ends = [sorted(place[other] for other in item.below) for item in upper]
            flat: list[int] = []
            for group in ends:
                total += sum(1 for end in group for earlier in flat if earlier > end)
                flat += group
        return total

    def _place(self) -> None:
        """Each layer in turn as near to its neighbours as the widths allow."""
        for layer in self.layers:
            for item, x in zip(layer, _spread([0.0] * len(layer), [1.0] * len(layer), layer), strict=True):
                item.x = x
        for sweep in range(3 * SWEEPS):
            direction = sweep % 3
            for layer in reversed(self.layers) if direction == 1 else self.layers:
                self._settle(layer, up=direction != 1, down=direction != 0)

    def _settle(self, layer: list[_Item], up: bool, down: bool) -> None:
        wanted, weights = [], []
        for item in layer:
            around = [*(item.above if up else ()), *(item.below if down else ())]
            pulls = [(_stiffness(item, other), other.x) for other in around]
            weight = sum(pull for pull, _ in pulls)
            wanted.append(sum(pull * x for pull, x in pulls) / weight if weight else item.x)
            weights.append(weight or 0.01)
        for item, x in zip(layer, _spread(wanted, weights, layer), strict=True):
            item.x = x

    def _coordinates(self) -> Layout:
        shift = MARGIN - min(item.x - item.left for layer in self.layers for item in layer)
        for layer in self.layers:
            for item in layer:
                item.x += shift
        tops, y = [], MARGIN
        for index, layer in enumerate(self.layers):
            height = max(item.height for item in layer)
            tops.append((y, y + height))
            slant = max((abs(item.x - other.x) for item in layer for other in item.below), default=0.0)
            y += height + (0 if index == len(self.layers) - 1 else STEP + min(34.0, 0.07 * slant))
        boxes: dict[str, Box] = {}
        for item in self.items.values():
            boxes |= _boxes(item, sum(tops[item.rank]) / 2)
        right = max(box.x + box.width / 2 for box in boxes.values())
        bends = max(item.x for layer in self.layers for item in layer)
        routes = tuple(self._route(edge, boxes, tops) for edge in self.drawing.edges)
        return Layout(max(right, bends) + MARGIN, y + MARGIN, boxes, routes)

    def _route(self, edge: DrawnEdge, boxes: dict[str, Box], tops: list[Point]) -> Route:
        start, end = boxes[edge.source], boxes[edge.target]
        if edge not in self.chains:
            return Route(edge, ((start.x - start.width / 2, start.y), (end.x + end.width / 2, start.y)), True)
        chain = self.chains[edge]
        points: list[Point] = [(start.x, start.y + start.height / 2)]
        for bend in chain[1:-1]:
            points += [(bend.x, tops[bend.rank][0]), (bend.x, tops[bend.rank][1])]
        points.append((end.x + self._port(edge, end.width), end.y - end.height / 2))
        return Route(edge, tuple(points))

    def _port(self, edge: DrawnEdge, width: float) -> float:
        """Edges enter side by side, in the order in which they come from above."""
        arriving = [other for other in self.chains if other.target == edge.target]
        arriving.sort(key=lambda other: self.chains[other][-2].x)
        step = min(34.0, 0.66 * width / max(len(arriving) - 1, 1))
        return (arriving.index(edge) - (len(arriving) - 1) / 2) * step


def _stiffness(one: _Item, other: _Item) -> float:
    """Long edges want to be straight most."""
    return (1.0, 2.0, 8.0)[(one.node is None) + (other.node is None)]


def _boxes(item: _Item, y: float) -> Iterable[tuple[str, Box]]:
    assert item.node is not None
    yield item.key, Box(item.x, y, width := width_of(item.node), HEIGHT)
    top = y - (len(item.pills) * (PILL + 5) - 5) / 2
    for index, pill in enumerate(item.pills):
        size = width_of(pill)
        yield pill.id, Box(item.x + width / 2 + PILL_GAP + size / 2, top + index * (PILL + 5) + PILL / 2, size, PILL)


def _spread(wanted: Sequence[float], weights: Sequence[float], layer: Sequence[_Item]) -> list[float]:
    """Positions nearest to the `wanted` ones (weighted least squares) at which no two items of a layer overlap.

    With the least distances subtracted this is a regression to non-decreasing values: pool adjacent violators.
    """
    offsets = [0.0]
    for one, other in zip(layer, layer[1:], strict=False):
        offsets.append(offsets[-1] + one.right + ACROSS + other.left)
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for aim, weight, offset in zip(wanted, weights, offsets, strict=True):
        pools.append((aim - offset, weight, 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (m1, w1, n1), (m2, w2, n2) = pools[-2:]
            pools[-2:] = [((m1 * w1 + m2 * w2) / (w1 + w2), w1 + w2, n1 + n2)]
    flat = [mean for mean, _, count in pools for _ in range(count)]
    return [place + offset for place, offset in zip(flat, offsets, strict=True)]
