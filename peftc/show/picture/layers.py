"""The layers of a drawing: which node stands in which, where long edges bend, in what order from left to right.

Sugiyama's method: layers by longest path, a bend point wherever an edge passes a layer, and an order within each layer
by barycentres. Parameters belong to the node that reads them. Lengths are in CSS pixels.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

import networkx as nx

from peftc.show.picture.drawing import Drawing, DrawnEdge, DrawnNode

LETTER, SMALL_LETTER = 7.25, 6.65  # widths in a 12 and an 11 pixel monospaced font
HEIGHT, PILL = 30.0, 22.0
PORT_LETTER = 6.1  # in a 10 pixel font
BADGE = 24.0
ACROSS, STEP, PILL_GAP = 26.0, 26.0, 16.0
MARGIN = 28.0
INSET = 12.0  # an edge enters no nearer to a corner
SWEEPS = 16


@dataclass(eq=False)
class Item:
    """A node with its parameters, or the point where long edges pass a layer. `left` and `right` are from `x`."""

    key: str
    rank: int
    left: float = 5.0
    right: float = 5.0
    height: float = 0.0
    node: DrawnNode | None = None
    pills: list[DrawnNode] = field(default_factory=list)
    x: float = 0.0
    above: list[Item] = field(default_factory=list)
    below: list[Item] = field(default_factory=list)


def width_of(node: DrawnNode) -> float:
    """The width its label needs; a badge for each statement comes before it."""
    if node.kind == "parameter":
        return len(node.label) * SMALL_LETTER + 20
    return len(node.label) * LETTER + 26 + BADGE * len(node.origins)


def port_width(argument: str) -> float:
    """The room that an edge takes where it enters a node that says what each operand is."""
    return max(34.0, len(argument) * PORT_LETTER + 12)


def named_ports(drawing: Drawing) -> set[str]:
    """The nodes with so many operands that each edge says which it is: queries, keys, values, a mask."""
    count = Counter(edge.target for edge in drawing.edges if edge.argument)
    return {key for key, edges in count.items() if edges > 2}


class Layers:
    """The layers from top to bottom, each from left to right, and the way of each edge through them."""

    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing
        self.items: dict[str, Item] = {}
        self.chains: dict[DrawnEdge, list[Item]] = {}
        self.bends: list[Item] = []
        self.layers: list[list[Item]] = []
        self.arriving: dict[str, list[DrawnEdge]] = defaultdict(list)
        self.leaving: dict[str, list[DrawnEdge]] = defaultdict(list)
        self._rank()
        self._bend()
        self._order()

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
        ports: dict[str, float] = defaultdict(float)
        named = named_ports(self.drawing)
        for edge in self.drawing.edges:
            if edge.target in named and edge.source not in beside:
                ports[edge.target] += port_width(edge.argument)
        self.widths = {key: max(width_of(by_id[key]), ports[key]) for key in order}
        for key in order:
            half = self.widths[key] / 2
            self.items[key] = Item(key, rank[key], half, half, HEIGHT, by_id[key])
        for pill, owner in beside.items():
            item = self.items[owner]
            item.pills.append(by_id[pill])
            item.right = max(item.right, self.widths[owner] / 2 + PILL_GAP + width_of(by_id[pill]))
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
        bends: dict[tuple[str, bool, int], Item] = {}
        links: dict[tuple[int, int], tuple[Item, Item]] = {}
        for edge in self.drawing.edges:
            source, target = self.items.get(edge.source), self.items[edge.target]
            if source is None:
                continue
            chain = [source]
            for rank in range(source.rank + 1, target.rank):
                key = (edge.source, edge.target in inserted, rank)
                chain.append(bends.setdefault(key, Item(f"{edge.source} {rank}", rank)))
            chain.append(target)
            self.chains[edge] = chain
            self.arriving[edge.target].append(edge)
            self.leaving[edge.source].append(edge)
            for upper, lower in pairwise(chain):
                links[id(upper), id(lower)] = (upper, lower)
        for upper, lower in links.values():
            upper.below.append(lower)
            lower.above.append(upper)
        order = {key: index for index, key in enumerate(dict.fromkeys((source, flag) for source, flag, _ in bends))}
        self.bends = [bends[key] for key in sorted(bends, key=lambda key: (order[key[:2]], key[2]))]
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
        seen: dict[Item, None] = {}
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

    def _by_barycentre(self, layer: list[Item], downward: bool) -> None:
        place = {item: index for other in self.layers for index, item in enumerate(other)}

        def centre(item: Item) -> float:
            around = item.above if downward else item.below
            return sum(place[other] for other in around) / len(around) if around else float(place[item])

        layer.sort(key=centre)

    def _crossings(self) -> int:
        total = 0
        for upper, lower in pairwise(self.layers):
            place = {item: index for index, item in enumerate(lower)}
            ends = [sorted(place[other] for other in item.below) for item in upper]
            flat: list[int] = []
            for group in ends:
                total += sum(1 for end in group for earlier in flat if earlier > end)
                flat += group
        return total
