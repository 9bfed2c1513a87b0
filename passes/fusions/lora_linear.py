"""Low-rank branches and the products with frozen weights that they stand beside, for one input together."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence

import torch
from torch import fx

from peftc.branches import Branch, beside, branches, check_branches, joined
from peftc.fusion import Editor, Fusion, Match, Miss, fusion
from peftc.ir import value as fake
from peftc.patterns import either, op, read_elsewhere, value
from peftc.seeds import dropout_seed

aten = torch.ops.aten

_x, _weight, _bias = value("x"), value("weight"), value("bias")
_TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.mT.default)
_PRODUCTS = (aten.matmul.default, aten.mm.default)
# The length of a row is not that of its bias: DoRA takes the bias off again.
_unbiased = op(aten.sub.Tensor, op(aten.linear.default, _x, _weight, value("removed")), value("removed"))
_plain = either(
    op(aten.linear.default, _x, _weight),
    op(aten.linear.default, _x, _weight, _bias),
    _unbiased,
    op(_PRODUCTS, _x, op(_TRANSPOSES, _weight, name="transposition")),
)
_transposed = either(
    op(aten.addmm.default, _bias, _x, _weight, name="transposed"),
    op(_PRODUCTS, _x, _weight, name="transposed"),
)


@fusion
class LoraLinear(Fusion):
    """y_i = W_i x + b_i + s_i B_i (A_i x) for every i that reads the same x, in the same block.

    One product makes all A_i x; B_i A_i x is added to y_i in place; x and the A_i x are all that is kept. Dropout is
    one mask for all of them, made of a seed in the forward and again in the backward pass; in `eval()` there is none.
    """

    name = "lora_linear"
    rank = 3
    pattern = beside(either(_plain, _transposed))

    def check(self, match: Match, editor: Editor) -> Miss | None:
        weight, bias = match["weight"], match["bias"]
        if fake(weight).dim() != 2 or any(fake(one.a).dim() != 2 for one in branches(match)):
            return Miss(match.root, f"{weight.name} is no matrix", (weight,))
        if bias is not None and fake(bias).dim() != 1:
            return Miss(match.root, f"{bias.name} is no vector", (bias,))
        free = [match["transposition"]] if match["transposition"] else []
        return check_branches(match, editor, (weight,)) or read_elsewhere(match, free)

    def group(self, match: Match, editor: Editor) -> Hashable:
        """By what they read, where they are, and what all must have in common."""
        found = branches(match)[0]
        alike = match["transposed"] is None, match["bias"] is None, found.p, found.training, fake(found.a).dtype
        return match["x"], editor.block(match.root), *alike

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
        first, here = matches[0], matches[0].root
        for match in matches:
            for node in (match["weight"], match["bias"]):
                if node is not None:
                    editor.hoist(node, here)
        found = [joined(match, editor, here) for match in matches]
        biases = [match["bias"] for match in matches if match["bias"] is not None]
        seed = self._seed(first, found[0], editor)
        made = editor.emit(
            first, here, torch.ops.peftc.lora_linear.default, first["x"],
            [match["weight"] for match in matches], biases, [one.a for one in found], [one.b for one in found],
            [one.scale for one in found], first["transposed"] is not None, seed, found[0].p, 0,
        )  # fmt: skip
        return [editor.emit(match, here, operator.getitem, made, place) for place, match in enumerate(matches)]

    def _seed(self, match: Match, one: Branch, editor: Editor) -> fx.Node | None:
        if not one.p:
            return None
        return editor.emit(match, match.root, dropout_seed, one.training, fake(match["x"]).device)
