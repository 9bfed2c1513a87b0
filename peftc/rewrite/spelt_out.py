"""Keys and values at an attention that is no single operation: scores, what is done to them, softmax, product.

The attention keeps every node it has. The scores of the added keys go the same way as its own as far as the softmax,
which then reads both; what the softmax gives to the added keys goes its own same way to a product with their values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from peftc.graph.ir import Provenance, computed, expression, is_tensor, value
from peftc.graph.rows import path_between
from peftc.planning.plan import Binding
from peftc.protocol.site import Attention, AttentionPattern
from peftc.rewrite.positions import Lengthened, Positions, made
from peftc.roles.counting import tokens_of
from peftc.roles.flow import SCORES

aten = torch.ops.aten

SHAPED = {aten.view.default, aten.reshape.default, aten.expand.default}
Copies = dict[fx.Node, fx.Node]


class SpeltOut:
    """One attention, and keys [..., width, count] and values [..., count, width] for it."""

    def __init__(
        self, binding: Binding, pattern: AttentionPattern, keys: fx.Node, values: fx.Node, positions: Positions,
        current: dict[fx.Node, fx.Node], stamp: Provenance,
    ) -> None:  # fmt: skip
        """`current`: what the softmax over the attention's own keys and its result have become by earlier methods."""
        site = binding.site
        assert isinstance(site, Attention)
        assert pattern.scores is not None
        assert pattern.softmax is not None
        self.scores, self.softmax, self.out = pattern.scores, pattern.softmax, pattern.out
        self.graph = self.out.graph
        self.tokens = tokens_of(site)
        self.keys, self.values = keys, values
        self.count = int(value(keys).shape[-1])
        self.positions, self.site, self.method, self.stamp = positions, site, binding.method, stamp
        self.current = current
        self.last = self.softmax.prev

    def in_front(self) -> None:
        """One softmax over both: [scores of the added keys, the attention's own scores]."""
        scores, text, out = self._all_scores(), self._text(), self._result()
        behind = path_between(text, self.out)
        added = self._scores(scores[-1], in_front=True)
        readers = list(self.softmax.users)
        self.softmax.update_arg(0, self._made(aten.cat.default, ([added, *scores], -1), self.softmax))
        self.softmax.meta["val"] = computed(self.softmax)
        self.last = self.softmax
        rest = self._made(aten.slice.Tensor, (self.softmax, -1, self.count, None), self.softmax)
        for reader in readers:
            reader.replace_input_with(self.softmax, rest)
        if text is self.softmax:
            self.current[self.softmax] = text = rest
        front = self._made(aten.slice.Tensor, (self.softmax, -1, 0, self.count), self.softmax)
        readers = list(out.users)
        self.last = out
        product = self._weighted({text: front}, behind)
        result = self._made(aten.add.Tensor, (out, product), self.out)
        for reader in readers:
            reader.replace_input_with(out, result)
        self.current[self.out] = result

    def apart(self) -> fx.Node:
        """A softmax of their own over the added keys, and its product with their values; nothing is dropped out."""
        own, text = self._all_scores()[-1], self._text()
        added = self._scores(own, in_front=False)
        self.last = self.out
        softmax = self._made(self.softmax.target, (added, *self.softmax.args[1:]), self.softmax, self.softmax.kwargs)
        return self._weighted({text: softmax}, path_between(text, self.out), dropout=False)

    def _all_scores(self) -> list[fx.Node]:
        """What the softmax reads: the scores of keys put in front before, and last the attention's own."""
        read: Any = self.softmax.args[0]
        return list(read.args[0]) if self.softmax in self.current else [read]

    def _text(self) -> fx.Node:
        """What the softmax gives to the attention's own keys."""
        return self.current.get(self.softmax, self.softmax)

    def _result(self) -> fx.Node:
        """What the attention gives, with the keys that were put in front before."""
        return self.current.get(self.out, self.out)

    def _scores(self, own: fx.Node, *, in_front: bool) -> fx.Node:
        """q times the added keys, and all that is done to the attention's own scores, of which `own` is the last.

        Their places in masks and biases: everybody sees them, and a bias that counts tokens counts on.
        """
        copies = {self.scores: self._product(in_front=in_front)}
        for node in path_between(self.scores, own) if own is not self.scores else ():
            copies[node] = self._step(node, copies, in_front=in_front)
        return copies[own]

    def _step(self, node: fx.Node, copies: Copies, *, in_front: bool) -> fx.Node:
        """One operation on the scores; a mask or bias that says nothing of the added keys is passed by."""
        known = dict(copies)
        for operand in node.all_input_nodes:
            if operand in copies or not self._is_over_keys(operand):
                continue
            columns = self._columns(operand) if in_front else None
            if columns is None:
                return next(copies[argument] for argument in node.all_input_nodes if argument in copies)
            known[operand] = columns
        copied = self._copied(node, known)
        for operand in known.keys() - copies.keys():
            self._move(operand, node)
        return copied

    def _is_over_keys(self, operand: fx.Node) -> bool:
        return is_tensor(operand) and value(operand).dim() > 0 and expression(value(operand).shape[-1]) == self.tokens

    def _columns(self, operand: fx.Node) -> fx.Node | None:
        """What a mask or bias says of the added keys, where that is something."""
        longer = self._longer()
        operand = self.positions.narrow.get(operand, operand)
        speaks = longer is not None and self.positions.speaks_of_positions(operand, self.method.windowed)
        taken = self.positions.taken.get(self.site.name, 0)
        return longer.in_front(operand, self.count, taken) if longer and speaks else None

    def _longer(self) -> Lengthened | None:
        return self.positions.of(self.site, self.method.takes_positions(self.site))

    def _move(self, operand: fx.Node, reader: fx.Node) -> None:
        """What it says of the text's own keys then counts on, too: once, whatever else comes in front."""
        longer = self._longer()
        assert longer is not None
        if operand not in self.positions.narrow:
            moved = longer.for_text(operand)
            self.positions.narrow[moved] = operand
            reader.replace_input_with(operand, moved)

    def _product(self, *, in_front: bool) -> fx.Node:
        """q times the added keys, with the bias that one kind of product adds."""
        scores = self.scores
        if scores.target is not aten.baddbmm.default:
            return self._inserted(scores, (scores.args[0], self.keys))
        bias, q = scores.args[:2]
        assert isinstance(bias, fx.Node)
        columns = self._columns(bias) if in_front else None
        if columns is not None:
            self._move(bias, scores)
            return self._inserted(scores, (columns, q, self.keys))
        product = self._made(aten.bmm.default, (q, self.keys), scores)
        return self._made(aten.mul.Tensor, (product, scores.kwargs.get("alpha", 1)), scores)

    def _weighted(self, copies: Copies, behind: list[fx.Node], *, dropout: bool = True) -> fx.Node:
        """The product of what the softmax gave to the added keys with their values."""
        for node in behind:
            if node.target is aten.dropout.default and not dropout:
                copies[node] = copies[node.all_input_nodes[0]]
                continue
            if node is self.out:
                args = list(node.args)
                args[SCORES[node.target][0]] = copies[args[SCORES[node.target][0]]]  # type: ignore[index]
                args[SCORES[node.target][1]] = self.values
                return self._inserted(node, tuple(args))
            copies[node] = self._copied(node, copies)
        raise AssertionError("an attention ends with its result")

    def _copied(self, node: fx.Node, copies: Copies) -> fx.Node:
        """`node` on the added keys; a shape that names how many keys there are names their number instead."""
        args = fx.map_arg(node.args, lambda given: copies.get(given, given))
        if node.target in SHAPED and isinstance(args[1], list | tuple) and self._is_count(args[1][-1]):
            args = (args[0], [*args[1][:-1], self.count], *args[2:])
        return self._inserted(node, args)

    def _is_count(self, size: Any) -> bool:
        return bool((expression(size.meta["val"]) if isinstance(size, fx.Node) else size) == self.tokens)

    def _inserted(self, like: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        return self._made(like.target, args, like, like.kwargs)

    def _made(
        self, target: Any, args: tuple[Any, ...], like: fx.Node, kwargs: Mapping[str, Any] | None = None
    ) -> fx.Node:
        self.last = made(self.graph, target, args, self.last, like, self.stamp, kwargs)
        return self.last
