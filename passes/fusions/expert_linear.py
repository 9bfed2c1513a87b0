"""Products with stacked experts that are frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from peftc.graph.patterns import op, value
from peftc.protocol.branches import GROUPED
from peftc.protocol.rule import Editor, Fusion, Match, Miss, fusion


@fusion
class ExpertLinear(Fusion):
    """y = W_e x for a frozen stack: the library's product would compute a gradient for every expert all the same."""

    name = "expert_linear"
    rank = 4
    pattern = op(GROUPED, value("x"), value("weight"), value("ends"))

    def check(self, match: Match, editor: Editor) -> Miss | None:
        if editor.learns(match["weight"]):
            return Miss(match.root, f"{match['weight'].name} learns", (match["weight"],))
        return None

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
        (match,) = matches
        arguments = match["x"], match["weight"], match["ends"]
        return [editor.emit(match, match.root, torch.ops.peftc.expert_linear.default, *arguments)]
