"""Low-rank branches beside frozen weights, whose rows then get other lengths."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from peftc.graph.ir import value as fake
from peftc.graph.patterns import add, cast, either, mul, value
from peftc.protocol.branches import BesideFrozen, beside, frozen, unbiased
from peftc.protocol.rule import Editor, Match, Miss, fusion

_length = value("length")


@fusion
class DoraLinear(BesideFrozen):
    """y_i = l_i * (W_i x + s_i B_i (A_i x)) + b_i for every i that reads the same x, in the same block.

    As `lora_linear`, with the lengths multiplied in place; it keeps the y_i, which the gradient of l_i needs, and
    nothing else of their size. What computes l_i, a vector, stays as it is.
    """

    name = "dora_linear"
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
