"""Where each node of a drawing goes: few crossings, straight long edges, parameters to the right of their reader.

`layers.py` finds layers and order; here every node gets the position nearest to its neighbours' in the least-squares
sense that the widths allow. Lengths are in CSS pixels.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from peftc.show.picture.drawing import Drawing, DrawnEdge
from peftc.show.picture.layers import (
    ACROSS,
    HEIGHT,
    INSET,
    MARGIN,
    PILL,
    PILL_GAP,
    STEP,
    SWEEPS,
    Item,
    Layers,
    named_ports,
    port_width,
    width_of,
)  # fmt: skip

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


def lay_out(drawing: Drawing) -> Layout:
    """Coordinates for every node and edge of `drawing`."""
    if not drawing.nodes:
        return Layout(2 * MARGIN, 2 * MARGIN, {}, ())
    return _Placement(drawing).run()


class _Placement:
    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing
        layers = Layers(drawing)
        self.items, self.layers, self.bends, self.chains = layers.items, layers.layers, layers.bends, layers.chains
        self.arriving, self.leaving, self.widths = layers.arriving, layers.leaving, layers.widths
        self.named = named_ports(drawing)

    def run(self) -> Layout:
        self._place()
        return self._coordinates()

    def _place(self) -> None:
        """Each layer in turn as near to its neighbours as the widths allow."""
        for layer in self.layers:
            for item, x in zip(layer, _spread([0.0] * len(layer), [1.0] * len(layer), layer), strict=True):
                item.x = x
        for sweep in range(3 * SWEEPS):
            direction = sweep % 3
            for layer in reversed(self.layers) if direction == 1 else self.layers:
                self._settle(layer, up=direction != 1, down=direction != 0)
        for _ in range(2):
            self._straighten()
            for sweep in range(SWEEPS):
                for layer in reversed(self.layers) if sweep % 2 else self.layers:
                    self._settle(layer, up=True, down=True, fixed=True)

    def _straighten(self) -> None:
        """Gives the bend points of a long edge one x, or as few as its neighbours leave room for."""
        left = {item: before for layer in self.layers for before, item in pairwise(layer)}
        right = {before: item for item, before in left.items()}
        straight: list[Item] = []
        low, high = -math.inf, math.inf
        for item in [*self.bends, None]:
            if item is not None:
                least = left[item].x + left[item].right + ACROSS + item.left if item in left else -math.inf
                most = right[item].x - right[item].left - ACROSS - item.right if item in right else math.inf
                follows = bool(straight) and straight[-1] in item.above
                if follows and max(low, least) <= min(high, most):
                    straight.append(item)
                    low, high = max(low, least), min(high, most)
                    continue
            if straight:
                mean = sum(bend.x for bend in straight) / len(straight)
                for bend in straight:
                    bend.x = max(low, min(high, mean))
            if item is not None:
                straight, low, high = [item], least, most

    def _settle(self, layer: list[Item], up: bool, down: bool, fixed: bool = False) -> None:
        wanted, weights = [], []
        for item in layer:
            if fixed and item.node is None:
                wanted.append(item.x)
                weights.append(1e6)
                continue
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
        slants = self._slants()
        tops, y = [], MARGIN
        for index, layer in enumerate(self.layers):
            height = max(item.height for item in layer)
            tops.append((y, y + height))
            y += height + (0 if index == len(self.layers) - 1 else STEP + slants[index])
        boxes: dict[str, Box] = {}
        for item in self.items.values():
            boxes |= _boxes(item, sum(tops[item.rank]) / 2, self.widths[item.key])
        right = max(box.x + box.width / 2 for box in boxes.values())
        bends = max(item.x for layer in self.layers for item in layer)
        routes = tuple(self._route(edge, boxes, tops) for edge in self.drawing.edges)
        return Layout(max(right, bends) + MARGIN, y + MARGIN, boxes, routes)

    def _slants(self) -> dict[int, float]:
        """More room below a layer whose edges go far to the side, or arrive with their names."""
        more: dict[int, float] = defaultdict(float)
        for edge, chain in self.chains.items():
            named = 14.0 if edge.target in self.named else 0.0
            for upper, lower in pairwise(chain):
                slant = min(34.0, 0.07 * abs(upper.x - lower.x)) + (named if lower is chain[-1] else 0.0)
                more[upper.rank] = max(more[upper.rank], slant)
        return more

    def _route(self, edge: DrawnEdge, boxes: dict[str, Box], tops: list[Point]) -> Route:
        start, end = boxes[edge.source], boxes[edge.target]
        if edge not in self.chains:
            return Route(edge, ((start.x - start.width / 2, start.y), (end.x + end.width / 2, end.y)), True)
        chain = self.chains[edge]
        first, last = start.x, end.x + self._port(edge, end.width)
        before = chain[-2].x
        if self.arriving[edge.target] == [edge] and abs(before - end.x) < end.width / 2 - INSET:
            last = before
        after = chain[1].x if len(chain) > 2 else last
        if self.leaving[edge.source] == [edge] and abs(after - start.x) < start.width / 2 - INSET:
            first = after
        points: list[Point] = [(first, start.y + start.height / 2)]
        for bend in chain[1:-1]:
            points += [(bend.x, tops[bend.rank][0]), (bend.x, tops[bend.rank][1])]
        points.append((last, end.y - end.height / 2))
        return Route(edge, tuple(points))

    def _port(self, edge: DrawnEdge, width: float) -> float:
        """Edges enter side by side, in the order in which they come from above."""
        arriving = sorted(self.arriving[edge.target], key=lambda other: self.chains[other][-2].x)
        if edge.target in self.named:
            rooms = [port_width(other.argument) for other in arriving]
            place = arriving.index(edge)
            return sum(rooms[:place]) + rooms[place] / 2 - sum(rooms) / 2
        step = min(34.0, 0.8 * width / max(len(arriving) - 1, 1))
        return (arriving.index(edge) - (len(arriving) - 1) / 2) * step


def _stiffness(one: Item, other: Item) -> float:
    """Chains in which each node has one reader and one operand want to be straight most, then long edges."""
    upper, lower = sorted((one, other), key=lambda item: item.rank)
    if one.node and other.node:
        return 12.0 if len(upper.below) == 1 == len(lower.above) else 1.0
    return 8.0 if one.node is other.node else 0.7


def _boxes(item: Item, y: float, width: float) -> Iterable[tuple[str, Box]]:
    yield item.key, Box(item.x, y, width, HEIGHT)
    top = y - (len(item.pills) * (PILL + 5) - 5) / 2
    for index, pill in enumerate(item.pills):
        size = width_of(pill)
        yield pill.id, Box(item.x + width / 2 + PILL_GAP + size / 2, top + index * (PILL + 5) + PILL / 2, size, PILL)


def _spread(wanted: Sequence[float], weights: Sequence[float], layer: Sequence[Item]) -> list[float]:
    """Positions nearest to the `wanted` ones (weighted least squares) at which no two items of a layer overlap.

    With the least distances subtracted this is a regression to non-decreasing values: pool adjacent violators.
    """
    offsets = [0.0]
    for one, other in pairwise(layer):
        offsets.append(offsets[-1] + one.right + ACROSS + other.left)
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for aim, weight, offset in zip(wanted, weights, offsets, strict=True):
        pools.append((aim - offset, weight, 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (m1, w1, n1), (m2, w2, n2) = pools[-2:]
            pools[-2:] = [((m1 * w1 + m2 * w2) / (w1 + w2), w1 + w2, n1 + n2)]
    flat = [mean for mean, _, count in pools for _ in range(count)]
    return [place + offset for place, offset in zip(flat, offsets, strict=True)]
