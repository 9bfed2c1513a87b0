"""A factor for each of some rows of a fused weight, as one for each of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from peftc.graph.ir import value as fake
from peftc.graph.patterns import anything, either, mul, op, read_elsewhere, value
from peftc.protocol.rule import Editor, Fusion, Match, Miss, fusion

aten = torch.ops.aten

_whole, _length = value("whole"), value("length")
_start, _rows = anything("start"), value("rows")
_part = mul(_length, op(aten.narrow.default, _whole, -1, _start, anything("width"), name="part"))
_picked = mul(_length, op(aten.index_select.default, _whole, -1, _rows, name="part"))


@fusion
class ScaledRows(Fusion):
    """y with some of its features times l is y times l', which has ones for the others.

    No copy of y is made for each slice; `scaled_linear` then takes the factors of q, k and v of one weight together.
    """

    name = "scaled_rows"
    rank = 2
    pattern = either(
        op(aten.slice_scatter.default, _whole, _part, -1, _start, anything("end")),
        op(aten.index_copy.default, _whole, -1, _rows, _picked),
    )

    def check(self, match: Match, editor: Editor) -> Miss | None:
        length = match["length"]
        if fake(length).dim() != 1:
            return Miss(match.root, f"{length.name} is no vector", (length,))
        if fake(length).shape[0] != fake(match["part"]).shape[-1]:
            return Miss(match.root, f"{length.name} has no entry for each row", (length,))
        if fake(length).dtype != fake(match["whole"]).dtype:
            return Miss(match.root, f"{length.name} is of another precision", (length,))
        return read_elsewhere(match)

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
        (match,) = matches
        here, length, count = match.root, match["length"], fake(match.root).shape[-1]
        if match["rows"] is None:
            padding = [match["start"], count - match["end"]]
            wide = editor.emit(match, here, aten.constant_pad_nd.default, length, padding, 1.0)
        else:
            ones = editor.emit(match, here, aten.new_ones.default, length, [count])
            wide = editor.emit(match, here, aten.index_copy.default, ones, 0, match["rows"], length)
        return [editor.emit(match, here, aten.mul.Tensor, match["whole"], wide)]
