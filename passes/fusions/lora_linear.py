"""Low-rank branches and the products with frozen weights that they stand beside, for one input together."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from peftc.protocol.branches import BesideFrozen, beside, frozen
from peftc.protocol.rule import Editor, Match, fusion


@fusion
class LoraLinear(BesideFrozen):
    """y_i = W_i x + b_i + s_i B_i (A_i x) for every i that reads the same x, in the same block.

    One product makes all A_i x; B_i A_i x is added to y_i in place; x and the A_i x are all that is kept. Dropout is
    one mask for all of them, made of a seed in the forward and again in the backward pass; in `eval()` there is none.
    """

    name = "lora_linear"
    sought = ("lora",)
    pattern = beside(frozen())

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
        first, all_ = matches[0], self.together(matches, editor)
        biases = [match["bias"] for match in matches if match["bias"] is not None]
        made = editor.emit(
            first, all_.here, torch.ops.peftc.lora_linear.default, all_.x, all_.weights, biases, all_.a, all_.b,
            all_.scales, first["transposed"] is not None, all_.seed, all_.p, 0,
        )  # fmt: skip
        return [editor.emit(match, all_.here, operator.getitem, made, place) for place, match in enumerate(matches)]
