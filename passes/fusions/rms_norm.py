"""Root mean square normalisation, in the spellings of models that write it out."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from peftc.graph.ir import is_tensor
from peftc.graph.ir import value as fake
from peftc.graph.patterns import add, cast, either, mul, number, op, read_elsewhere, value
from peftc.protocol.rule import Editor, Fusion, Match, Miss, fusion

aten = torch.ops.aten

_x = value("x")
_wide = cast(_x, "wide")
_square = either(op(aten.pow.Tensor_Scalar, _wide, 2), op(aten.square.default, _wide), mul(_wide, _wide))
_moment = add(op(aten.mean.dim, _square, [-1], True), number("eps"))
_root = op(aten.sqrt.default, _moment)
_inverse = either(op(aten.rsqrt.default, _moment), op(aten.reciprocal.default, _root))
_normal = either(mul(_wide, _inverse, name="product"), op(aten.div.Tensor, _wide, _root, name="product"))


@fusion
class RMSNorm(Fusion):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32, as one operation that keeps x and 1/rms.

    A cast may stand before the product with the weight (Llama), behind it (Gemma, whose weight is 1 + w), or nowhere.
    """

    name = "rms_norm"
    rank = 1
    pattern = either(cast(mul(cast(_normal, "narrow"), value("weight")), "result"), cast(_normal, "result"))

    def check(self, match: Match, editor: Editor) -> Miss | None:
        x, weight, product = match["x"], match["weight"], match["product"]
        computes, given = fake(product).dtype, fake(x).dtype
        if computes != torch.promote_types(given, torch.float32):
            return _miss(match, f"it computes in {_name(computes)} what is given in {_name(given)}", product)
        if fake(match.root).dtype != given:
            return _miss(match, f"it makes {_name(fake(match.root).dtype)} of {_name(given)}", match.root)
        if weight is not None and (fake(weight).dim() != 1 or fake(weight).shape[0] != fake(x).shape[-1]):
            return _miss(match, f"its weight is no vector of {fake(x).shape[-1]} entries", weight)
        return read_elsewhere(match)

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
        (match,) = matches
        narrow = match["narrow"] is not None and fake(match["narrow"]).dtype == fake(match["x"]).dtype
        norm = torch.ops.peftc.rms_norm.default
        both = editor.emit(match, match.root, norm, match["x"], match["weight"], match["eps"], narrow)
        result = editor.emit(match, match.root, operator.getitem, both, 0)
        if fake(result).dtype != fake(match.root).dtype:  # a wide weight after the cast makes it wide again
            result = editor.emit(match, match.root, aten.to.dtype, result, fake(match.root).dtype)
        return [result]


def _miss(match: Match, reason: str, culprit: fx.Node) -> Miss:
    assert is_tensor(culprit)
    return Miss(match.root, reason, (culprit,))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
