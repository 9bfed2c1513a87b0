"""Room for tokens in front of the text: positions that count on, and masks and biases for a longer sequence.

What stands in front of the text takes its first positions. A value that counts tokens (an `arange` over their number,
a running sum of the mask, the first entries of a stored table) is therefore computed for a sequence with so many
more tokens at its front, by the model's own operations, and its last entries are what the text gets. So learned
positions, rotary angles, linear biases and buckets of distance all move as if those tokens had been there.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from peftc.diagnostics.source import Span
from peftc.graph.ir import PROVENANCE, STACK, Provenance, computed, expression, is_tensor, splice, trace, value
from peftc.planning.plan import Plan
from peftc.protocol.site import Attention
from peftc.roles.counting import Counting, core, is_size, stream, token_test, tokens_of

aten = torch.ops.aten

GIVEN = "position_ids"  # what transformers calls positions that the caller gives


def made(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], after: fx.Node, like: fx.Node, stamp: Provenance,
    kwargs: Mapping[str, Any] | None = None,
) -> fx.Node:  # fmt: skip
    """A new node behind `after`, in the module of `like`, with the fake value it computes."""
    with graph.inserting_after(after):
        node = graph.call_function(target, args, dict(kwargs or {}))
    node.meta = {"val": computed(node), PROVENANCE: stamp, STACK: like.meta.get(STACK)}
    return node


@dataclass
class Lengthened:
    """Values of a graph as they would be with `by` more tokens in front of the sequence whose length is `tokens`.

    Where only the last of them are new, `before` is how many are not: with more in front, more were before.
    """

    graph: fx.Graph
    tokens: Any
    by: int
    stamp: Provenance
    before: Any = 0
    known: dict[fx.Node, fx.Node] = field(default_factory=dict)
    asked: dict[fx.Node, bool] = field(default_factory=dict)

    def __call__(self, node: fx.Node) -> fx.Node:
        """The node that computes `node`'s value for the longer sequence; `node` itself where that is the same."""
        if node not in self.known:
            self.known[node] = self._made(node) if self.depends(node) else node
        return self.known[node]

    def depends(self, node: fx.Node) -> bool:
        """Whether the value of `node` is another one for a longer sequence."""
        if node not in self.asked:
            self.asked[node] = self._is_length(node) or (
                node.op == "placeholder" and is_tensor(node) and self.tokens in map(expression, value(node).shape)
            ) or (
                not is_size(node) and any(self.depends(argument) for argument in node.all_input_nodes)
            )  # fmt: skip
        return self.asked[node]

    def counts_tokens(self, node: fx.Node) -> bool:
        """Whether each size of a value is that of the sequence or of its new tokens, if it has to do with it.

        An `arange` over every token of the batch, as a router's sorted tokens have one, says nothing of positions.
        """
        sizes = map(expression, value(node).shape) if is_tensor(node) else ()
        return all(
            isinstance(size, int) or size in (self.tokens, self.tokens - self.before)
            or not size.free_symbols & self.tokens.free_symbols
            for size in sizes
        )  # fmt: skip

    def for_text(self, node: fx.Node) -> fx.Node:
        """The longer value less its first entries: those of the text's own tokens."""
        longer = self(node)
        for dim, size in enumerate(value(node).shape):
            if expression(size) == self.tokens:
                longer = self._call(aten.slice.Tensor, (longer, dim, self.by, None), longer, node)
        return longer

    def count_given_on(self) -> None:
        """Positions that the caller gives for the text count on, too."""
        inputs = self.graph.find_nodes(op="placeholder")
        for node in inputs:
            if str(node.target) == GIVEN and self.tokens - self.before in map(expression, value(node).shape):
                readers = list(node.users)
                now = self._call(aten.add.Tensor, (node, self.by), inputs[-1], node)
                for reader in readers:
                    reader.replace_input_with(node, now)

    def in_front(self, node: fx.Node, count: int, taken: int) -> fx.Node:
        """[..., tokens, keys] -> [..., tokens, count]: what it says of `count` keys, `taken` others before the text."""
        rows, end = self._text_rows(node), self.by - taken
        return self._call(aten.slice.Tensor, (rows, -1, end - count, end), rows, node)

    def with_front(self, node: fx.Node, count: int) -> fx.Node:
        """[..., tokens, keys] -> [..., tokens, count + keys]."""
        rows = self._text_rows(node)
        if count == self.by:
            return rows
        return self._call(aten.slice.Tensor, (rows, -1, self.by - count, None), rows, node)

    def _text_rows(self, node: fx.Node) -> fx.Node:
        longer, shape = self(node), value(node).shape
        if len(shape) > 1 and expression(shape[-2]) == self.tokens:
            return self._call(aten.slice.Tensor, (longer, -2, self.by, None), longer, node)
        return longer

    def _is_length(self, node: fx.Node) -> bool:
        size = node.meta.get("val")
        return isinstance(size, torch.SymInt) and expression(size) in (self.tokens, self.before)

    def _made(self, node: fx.Node) -> fx.Node:
        if self._is_length(node):
            return self._call(operator.add, (node, self.by), node, node)
        if node.op == "placeholder" or token_test(node) is not None:
            dims = [dim for dim, size in enumerate(value(node).shape) if expression(size) == self.tokens]
            return self._padded(node, dims, 1 if node.op == "placeholder" else int(bool(token_test(node))))
        args, kwargs = fx.map_arg((node.args, node.kwargs), self)
        # Behind `node` is behind its inputs' longer values, which stand behind the inputs themselves.
        return made(self.graph, node.target, args, node, node, self.stamp, kwargs)

    def _padded(self, node: fx.Node, dims: Sequence[int], fill: int) -> fx.Node:
        """The mask with ones in front: every token before the text is there, for all to see."""
        after = self.graph.find_nodes(op="placeholder")[-1] if node.op == "placeholder" else node
        for dim in dims:
            padding = [0, 0] * (value(node).dim() - 1 - dim) + [self.by, 0]
            after = node = self._call(aten.constant_pad_nd.default, (node, padding, fill), after, node)
        return node

    def _call(self, target: Any, args: tuple[Any, ...], after: fx.Node, like: fx.Node) -> fx.Node:
        return made(self.graph, target, args, after, like, self.stamp)


@dataclass
class Positions:
    """What passes know of a model's positions: one `Lengthened` for each sequence with something in front."""

    graph: fx.Graph
    counting: Counting
    longer: dict[Any, Lengthened] = field(default_factory=dict)
    masks: dict[Hashable, fx.Node] = field(default_factory=dict)
    narrow: dict[fx.Node, fx.Node] = field(default_factory=dict)  # the model's own mask, of each made wider
    taken: dict[str, int] = field(default_factory=dict)  # positions right before the text, by attention

    def of(self, site: Attention, takes: int) -> Lengthened | None:
        """The longer values of the site's own sequence; None for keys there that take no positions of it."""
        return self.longer.get(tokens_of(site)) if takes and not site.cross else None

    def take(self, site: Attention, takes: int) -> None:
        """What comes after stands in front of these positions."""
        self.taken[site.name] = self.taken.get(site.name, 0) + takes

    def speaks_of_positions(self, mask: fx.Node, windowed: bool) -> bool:
        """Whether a mask or bias has something of its own to say of tokens in front of the text.

        A bias that counts positions has. A mask has not, for everybody sees them, unless a window may pass them by
        (`windowed`). What depends on the tokens themselves cannot have.
        """
        if mask in self.counting.hidden:
            return False
        return self.counting.is_bias(mask) or (windowed and mask in self.counting.counted)

    def widened(
        self, mask: fx.Node, keys: Any, site: Attention, count: int, takes: int, windowed: bool, stamp: Provenance
    ) -> fx.Node:
        """The mask [..., tokens, keys] of a fused attention with `count` keys in front, made once for all readers.

        Of the `keys` there, those of earlier methods are some; `takes` of the new ones are positions of the sequence.
        """
        own, taken = self.narrow.get(mask, mask), self.taken.get(site.name, 0)
        longer = self.of(site, takes)
        moves = longer is not None and self.speaks_of_positions(own, windowed)
        key = (mask, expression(keys), count, taken, moves)
        if key not in self.masks:
            if longer is None or not moves:
                wide = self._seen_by_all(mask, keys, count, stamp)
            elif own is mask:
                wide = longer.with_front(mask, count)
            else:
                front = longer.in_front(own, count, taken)
                wide = made(self.graph, aten.cat.default, ([front, mask], -1), max(front, mask), mask, stamp)
            self.masks[key] = wide
            self.narrow[wide] = own
        return self.masks[key]

    def _seen_by_all(self, mask: fx.Node, keys: Any, count: int, stamp: Provenance) -> fx.Node:
        def widen(mask: Tensor) -> Tensor:
            wide = mask if expression(mask.shape[-1]) == expression(keys) else mask.expand(*mask.shape[:-1], keys)
            front = (*mask.shape[:-1], count)
            return torch.cat([mask.new_ones(front) if mask.dtype == torch.bool else mask.new_zeros(front), wide], -1)

        after = self.graph.find_nodes(op="placeholder")[-1] if mask.op == "placeholder" else mask
        return splice(self.graph, trace(widen, value(mask)), [mask], after, stamp, mask)[0]


def make_room(graph: fx.Graph, plan: Plan, pass_name: str) -> Positions:
    """Moves the positions of every sequence that a method takes the first places of.

    All the layers count alike, so the attention that takes the most places decides; those that take fewer stand
    right before the text. A sequence of a fixed length (an image's patches) has no such room: its positions stay.
    """
    every = [site for site in plan.sites if isinstance(site, Attention)]
    positions = Positions(graph, Counting(graph))
    takes: dict[Any, dict[str, tuple[int, Attention, Span]]] = defaultdict(dict)
    for binding in plan.bindings:
        site = binding.site
        if isinstance(site, Attention) and not site.cross and (count := binding.method.takes_positions(site)):
            earlier, _, span = takes[tokens_of(site)].get(site.name, (0, site, binding.span))
            takes[tokens_of(site)][site.name] = (earlier + count, site, span)
    for tokens, takers in takes.items():
        if not isinstance(tokens, int):
            by, first, span = max(takers.values(), key=operator.itemgetter(0))
            before = _before(graph, plan, tokens)
            longer = Lengthened(graph, tokens, by, Provenance(pass_name, first.name, span), before)
            _shift(longer, [site for _, site, _ in takers.values()], every, positions.counting)
            positions.longer[tokens] = longer
    return positions


def _before(graph: fx.Graph, plan: Plan, tokens: Any) -> Any:
    """How many of the `tokens` were read by earlier calls, whose keys a cache gives."""
    past = plan.captured.past
    found = {expression(value(node).shape[2]) for node in graph.find_nodes(op="placeholder") if node.target in past}
    return next((before for before in found if tokens.has(before)), 0)


def _shift(longer: Lengthened, sites: list[Attention], every: list[Attention], counting: Counting) -> None:
    """Lets all that counts the text's tokens on its way to `sites` count from `longer.by`."""
    inside = stream(sites, every) - {node for site in every for node in core(site)}
    affected = [
        node for node in longer.graph.nodes
        if node in counting.counted and longer.depends(node) and longer.counts_tokens(node)
    ]  # fmt: skip
    moves: set[fx.Node] = set()  # read by nothing but the text on its way, and by what is itself so
    for node in reversed(affected):
        if all(user in moves or (user in counting.hidden and user in inside) for user in node.users):
            moves.add(node)
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in affected:
        if node not in moves:
            readers[node] = [user for user in node.users if user in counting.hidden and user in inside]
        elif not any(argument in moves for argument in node.all_input_nodes):
            readers[node] = list(node.users)
    longer.count_given_on()
    moved = {node: longer.for_text(node) for node, reading in readers.items() if reading}
    for node, now in moved.items():
        for reader in readers[node]:
            reader.replace_input_with(node, now)
