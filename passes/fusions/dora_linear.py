"""Low-rank branches beside frozen weights whose rows get other lengths, and the lengths that they are divided by."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import fx

from peftc.graph.ir import value as fake
from peftc.graph.patterns import add, cast, either, mul, number, op, read_elsewhere, value
from peftc.protocol.branches import BesideFrozen, beside, frozen, unbiased
from peftc.protocol.rule import Editor, Fusion, Match, Miss, fusion

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _constant(node: fx.Node) -> str | None:
    return None if node.target is aten.detach.default else f"{node.name} is no constant to the gradient"


_weight, _a, _b = value("weight"), value("a", _constant), value("b", _constant)
_norm = aten.linalg_vector_norm.default
_own = either(*(op(_norm, _weight, 2, [1], dtype=dtype) for dtype in DTYPES))
_narrow = cast(either(mul(_a, number("shrunk")), _a))
_cross = op(aten.sum.dim_IntList, mul(_b, op(aten.linear.default, _weight, _narrow)), [1])
_gram = op(aten.matmul.default, _a, op(aten.t.default, _a))
_added = op(aten.sum.dim_IntList, mul(_b, op(aten.matmul.default, _b, _gram)), [1])
_squared = add(add(mul(_own, _own), mul(_cross, number("twice"))), mul(_added, number("square")))
_length = value("length")


@fusion
class RowLengths(Fusion):
    """|W + s B A| of each row as one operation, from the three terms of its square; constant to the gradient."""

    name = "row_lengths"
    sought = ("dora",)
    pattern = op(aten.sqrt.default, op(aten.clamp_min.default, _squared, number("least")))

    def check(self, match: Match, editor: Editor) -> Miss | None:
        scale = self._scale(match)
        if not math.isclose(scale**2, match["square"], rel_tol=1e-6):
            return Miss(match.root, f"its terms are scaled by {scale:g} and by the root of {match['square']:g}")
        if editor.learns(match["weight"]):
            return Miss(match.root, f"{match['weight'].name} learns, too", (match["weight"],))
        if fake(match.root).dtype != fake(match["a"]).dtype or fake(match["a"]).dtype != fake(match["b"]).dtype:
            return Miss(match.root, "its factors are of another precision than it is", (match["a"], match["b"]))
        return read_elsewhere(match)

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
        (match,) = matches
        operands = match["weight"], match["a"], match["b"]
        lengths = torch.ops.peftc.row_lengths.default
        return [editor.emit(match, match.root, lengths, *operands, self._scale(match), match["least"])]

    def _scale(self, match: Match) -> float:
        return float(match["twice"] / 2 * (match["shrunk"] or 1.0))


@fusion
class DoraLinear(BesideFrozen):
    """y_i = l_i * (W_i x + s_i B_i (A_i x)) + b_i for every i that reads the same x, in the same block.

    As `lora_linear`, with the lengths multiplied in place; it keeps the y_i, which the gradient of l_i needs, and
    nothing else of their size. What computes l_i, a vector, stays as it is.
    """

    name = "dora_linear"
    sought = ("dora",)
    pattern = either(
        cast(add(mul(_length, beside(cast(unbiased()))), value("removed"))),
        cast(mul(_length, beside(cast(frozen())))),
    )

    def check(self, match: Match, editor: Editor) -> Miss | None:
        length, weight = match["length"], match["weight"]
        if fake(length).dim() != 1 or fake(length).shape[0] != fake(weight).shape[0]:
            return Miss(match.root, f"{length.name} has no entry for each row", (length,))
        if fake(match.root).dtype is torch.float16 and fake(length).dtype is not torch.float16:
            return Miss(match.root, "of lengths in fp32, gradients are not read off outputs in fp16", (length,))
        if match["bias"] is not None:
            return Miss(match.root, "the bias is scaled, too", (match["bias"],))
        if match["removed"] is not None and editor.learns(match["removed"]):
            return Miss(match.root, f"{match['removed'].target} learns, too", (match["removed"],))
        return super().check(match, editor)

    def bias(self, match: Match) -> fx.Node | None:
        found: fx.Node | None = match["removed"]
        return found

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
        first, all_ = matches[0], self.together(matches, editor, "length")
        biases = [match["removed"] for match in matches if match["removed"] is not None]
        made = editor.emit(
            first, all_.here, torch.ops.peftc.dora_linear.default, all_.x, all_.weights, biases, all_.a, all_.b,
            [match["length"] for match in matches], all_.scales, first["transposed"] is not None, all_.seed, all_.p, 0,
        )  # fmt: skip
        return [editor.emit(match, all_.here, operator.getitem, made, place) for place, match in enumerate(matches)]
