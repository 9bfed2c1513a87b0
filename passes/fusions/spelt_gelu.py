"""GELU's tanh form, written out entry by entry."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from peftc.graph.patterns import add, either, mul, number, op, value
from peftc.protocol.rule import Editor, Fusion, Match, fusion

aten = torch.ops.aten

_x = value("x")
_cube = op(aten.pow.Tensor_Scalar, _x, number(near=3.0))
_root = number(near=math.sqrt(2 / math.pi))
_factored = add(mul(mul(_x, number(near=0.044715)), _x), number(near=1.0))
_inner = either(mul(add(_x, mul(_cube, number(near=0.044715))), _root), mul(mul(_x, _root), _factored))


@fusion
class SpeltGelu(Fusion):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) as the one operation it is, which keeps x alone."""

    name = "spelt_gelu"
    rank = 0
    pattern = mul(mul(_x, number(near=0.5)), add(op(aten.tanh.default, _inner), number(near=1.0)))

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
        (match,) = matches
        return [editor.emit(match, match.root, aten.gelu.default, match["x"], approximate="tanh")]
