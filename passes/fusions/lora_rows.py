"""A low-rank branch on some rows of a fused weight, as a branch on all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from peftc.graph.ir import value as fake
from peftc.graph.patterns import anything, either, op, read_elsewhere, value
from peftc.protocol.branches import beside_one
from peftc.protocol.rule import Editor, Fusion, Match, Miss, fusion

aten = torch.ops.aten

_whole = value("whole")
_start, _rows = anything("start"), value("rows")
_part = beside_one(op(aten.narrow.default, _whole, -1, _start, anything("length")))
_picked = beside_one(op(aten.index_select.default, _whole, -1, _rows))


@fusion
class LoraRows(Fusion):
    """y with s B A x added to some of its features is y + s B' A x, where B' has rows of zeros for the others.

    No copy of y is made for each slice; q, k and v of one weight become branches beside one product, which
    `lora_linear` takes together. The zeros cost r multiplications an output, as many as one more rank would.
    """

    name = "lora_rows"
    rank = 2
    pattern = either(
        op(aten.slice_scatter.default, _whole, _part, -1, _start, anything("end")),
        op(aten.index_copy.default, _whole, -1, _rows, _picked),
    )

    def check(self, match: Match, editor: Editor) -> Miss | None:
        return read_elsewhere(match)

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
        (match,) = matches
        here, b = match.root, match["b0"]
        count = fake(match.root).shape[-1]
        if match["rows"] is None:
            padding = [0, 0, match["start"], count - match["end"]]
            wide = editor.emit(match, here, aten.constant_pad_nd.default, b, padding)
        else:
            shape = [*fake(b).shape[:-2], count, fake(b).shape[-1]]
            empty = editor.emit(match, here, aten.new_zeros.default, b, shape)
            wide = editor.emit(match, here, aten.index_copy.default, empty, -2, match["rows"], b)
        return [self._widened(match, wide, editor)]

    def _widened(self, match: Match, wide: fx.Node, editor: Editor) -> fx.Node:
        """The branch again, with B' for B, added to the whole."""
        here, thin = match.root, match["wide0"]
        if thin.target is aten.linear.default:
            result = editor.emit(match, here, thin.target, thin.args[0], wide)
        else:
            swapped = editor.emit(match, here, aten.transpose.int, wide, -2, -1)
            result = editor.emit(match, here, thin.target, thin.args[0], swapped, *thin.args[2:])
        if match["scale0"] is not None:
            result = editor.emit(match, here, aten.mul.Tensor, result, match["scale0"])
        if match["cast0"] is not None:
            result = editor.emit(match, here, match["cast0"].target, result, *match["cast0"].args[1:])
        return editor.emit(match, here, aten.add.Tensor, match["whole"], result)
