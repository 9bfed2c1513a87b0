"""Products with stacked experts that are frozen, alone and with low-rank branches beside them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from peftc.graph.patterns import add, either, op, read_elsewhere, value
from peftc.protocol.branches import GROUPED, beside, branches, check_branches, joined
from peftc.protocol.rule import Editor, Fusion, Match, Miss, fusion

aten = torch.ops.aten

_product = op(GROUPED, value("x"), value("weight"), value("ends"))


@fusion
class ExpertLora(Fusion):
    """y = W_e x + s B_e (A_e x), e the expert that a row of x was sent to.

    The library's product computes a gradient for every frozen expert, as large as all of them together. This one does
    not, and sums the branch in place. Biases that were picked for each row are added behind it.
    """

    name = "expert_lora"
    sought = ("grouped_mm",)
    rank = 3
    pattern = beside(either(_product, add(_product, value("added"))))

    def check(self, match: Match, editor: Editor) -> Miss | None:
        if any(one.p for one in branches(match)):
            return Miss(match.root, "its branch has a dropout", (branches(match)[0].a,))
        return check_branches(match, editor, (match["weight"],)) or read_elsewhere(match)

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
        (match,) = matches
        here = match.root
        one = joined(match, editor, here)
        arguments = match["x"], match["weight"], match["ends"], one.a, one.b, one.scale
        both = editor.emit(match, here, torch.ops.peftc.expert_lora.default, *arguments)
        result = editor.emit(match, here, operator.getitem, both, 0)
        if match["added"] is not None:
            result = editor.emit(match, here, aten.add.Tensor, result, match["added"])
        return [result]


@fusion
class ExpertLinear(Fusion):
    """y = W_e x for a frozen stack: the library's product would compute a gradient for every expert all the same."""

    name = "expert_linear"
    sought = ("grouped_mm",)
    rank = 4
    pattern = _product

    def check(self, match: Match, editor: Editor) -> Miss | None:
        if editor.learns(match["weight"]):
            return Miss(match.root, f"{match['weight'].name} learns", (match["weight"],))
        return None

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
        (match,) = matches
        arguments = match["x"], match["weight"], match["ends"]
        return [editor.emit(match, match.root, torch.ops.peftc.expert_linear.default, *arguments)]
