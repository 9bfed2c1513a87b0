"""Products with frozen weights whose outputs have a trained factor each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from peftc.branches import frozen
from peftc.fusion import Editor, Fusion, Match, Miss, fusion
from peftc.ir import value as fake
from peftc.patterns import mul, read_elsewhere, value


@fusion
class ScaledLinear(Fusion):
    """y = l * (W x + b) in one operation that keeps y, which what comes next needs, too, and no product beside it.

    The gradient of l comes from y divided by l: an entry that is 0 is multiplied as 2^-63 (in fp16 2^-11).
    """

    name = "scaled_linear"
    rank = 3
    pattern = mul(value("length"), frozen())

    def check(self, match: Match, editor: Editor) -> Miss | None:
        length, weight, bias = match["length"], match["weight"], match["bias"]
        if fake(weight).dim() != 2 or (bias is not None and fake(bias).dim() != 1):
            return Miss(match.root, f"{weight.name} is no matrix, or its bias no vector", (weight,))
        rows = fake(weight).shape[match["transposed"] is not None]
        if fake(length).dim() != 1 or fake(length).shape[0] != rows:
            return Miss(match.root, f"{length.name} has no entry for each row", (length,))
        if editor.learns(weight):
            return Miss(match.root, f"{weight.name} learns, too", (weight,))
        if not editor.learns(length):
            return Miss(match.root, f"{length.name} does not learn", (length,))
        if fake(match.root).dtype != fake(match["x"]).dtype:
            return Miss(match.root, f"{length.name} widens the product", (length,))
        return read_elsewhere(match, [match["transposition"]] if match["transposition"] else [])

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
        (match,) = matches
        arguments = match["x"], match["weight"], match["bias"], match["length"], match["transposed"] is not None
        return [editor.emit(match, match.root, torch.ops.peftc.scaled_linear.default, *arguments)]
