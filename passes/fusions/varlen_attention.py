"""Attention of several texts in a row, of which a mask of all tokens by all says who sees whom."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from peftc.graph.ir import STACK, expression
from peftc.graph.ir import value as fake
from peftc.graph.masks import seen
from peftc.graph.patterns import anything, either, op, read_elsewhere, value
from peftc.graph.shared_heads import shared_by_both
from peftc.protocol.rule import Editor, Fusion, Match, Miss, fusion

aten = torch.ops.aten
ops = torch.ops.peftc

_operands = (value("q"), value("k"), value("v"))


def _tells_texts_apart(mask: fx.Node) -> str | None:
    says = seen(mask)
    if says is None:
        return f"{mask.name} is no mask of texts that positions tell apart"
    return None if says.positions is not None else f"{mask.name} tells no texts apart"


_mask = value("mask", _tells_texts_apart)
_attention = aten.scaled_dot_product_attention.default
_scale = anything("scale")


@fusion
class VarlenAttention(Fusion):
    """Attention under a mask that is made of positions alone, over the bounds of the texts: no mask is made.

    Who sees whom is read off the operations that make the mask, exactly; the bounds are found once for all layers. Keys
    and values that heads share are not copied for each.
    """

    name = "varlen_attention"
    pattern = either(
        op(_attention, *_operands, _mask, scale=_scale),
        op(_attention, *_operands, _mask),
        op(_attention, *_operands, _mask, 0.0, scale=_scale),
        op(_attention, *_operands, _mask, enable_gqa=anything("shared"), scale=_scale),
        op(_attention, *_operands, _mask, enable_gqa=anything("shared")),
    )

    def check(self, match: Match, editor: Editor) -> Miss | None:
        q, k, v, mask = (match[name] for name in ("q", "k", "v", "mask"))
        says = seen(mask)
        assert says is not None
        assert says.positions is not None
        if any(fake(item).dim() != 4 for item in (q, k, v)):
            return Miss(match.root, "its operands are no heads of tokens", (q, k, v))
        rows, tokens = (expression(size) for size in fake(says.positions).shape)
        if any(
            (expression(fake(item).shape[0]), expression(fake(item).shape[2])) != (rows, tokens) for item in (q, k, v)
        ):
            return Miss(match.root, f"it has other tokens than {says.positions.name} positions", (q, k, v))
        if [expression(size) for size in fake(mask).shape] != [rows, 1, tokens, tokens]:
            return Miss(match.root, f"{mask.name} is not of all tokens by all", (mask,))
        return read_elsewhere(match)

    def group(self, match: Match, editor: Editor) -> fx.Node | None:
        says = seen(match["mask"])
        assert says is not None
        return says.positions

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
        bounds = self._bounds(matches[0], editor)
        return [self._attended(match, bounds, editor) for match in matches]

    def _bounds(self, match: Match, editor: Editor) -> list[fx.Node]:
        """The bounds and their number, in front of everything, in no block: all read them."""
        positions = self.group(match, editor)
        assert positions is not None
        first = next(node for node in editor.graph.nodes if node.op not in ("placeholder", "get_attr"))
        both = editor.emit(match, first, ops.text_bounds.default, positions)
        found = [both, *(editor.emit(match, first, operator.getitem, both, place) for place in (0, 1))]
        for node in found:
            node.meta[STACK] = positions.meta.get(STACK)
        return found[1:]

    def _attended(self, match: Match, bounds: list[fx.Node], editor: Editor) -> fx.Node:
        q, k, v = match["q"], match["k"], match["v"]
        says = seen(match["mask"])
        assert says is not None
        k, v = shared_by_both(k, v) or (k, v)
        scale = fake(q).shape[-1] ** -0.5 if match["scale"] is None else match["scale"]
        operation = ops.varlen_attention.default
        both = editor.emit(match, match.root, operation, q, k, v, *bounds, scale, says.causal, says.window)
        return editor.emit(match, match.root, operator.getitem, both, 0)
