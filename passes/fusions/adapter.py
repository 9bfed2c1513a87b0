"""A bottleneck adapter with its residual."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from peftc.graph.ir import value as fake
from peftc.graph.patterns import add, anything, cast, either, mul, number, op, read_elsewhere, value
from peftc.protocol.rule import Editor, Fusion, Match, Miss, fusion

aten = torch.ops.aten

_x = cast(value("x"))
_narrow = either(
    op(aten.linear.default, _x, value("down"), value("down_bias")), op(aten.linear.default, _x, value("down"))
)
_inner = either(
    op(aten.relu.default, _narrow, name="relu"),
    op(aten.gelu.default, _narrow, name="gelu"),
    op(aten.silu.default, _narrow, name="silu"),
    op(aten.tanh.default, _narrow, name="tanh"),
)
_wide = either(
    op(aten.linear.default, _inner, value("up"), value("up_bias")), op(aten.linear.default, _inner, value("up"))
)
_branch = either(mul(_wide, number("scale")), _wide)
_shaped = either(op(aten.reshape.default, _branch, anything("shape")), _branch)


@fusion
class Adapter(Fusion):
    """h + s (U f(D x + b) + c), behind a sublayer (x is h) or beside it: one operation that keeps x and D x + b."""

    name = "adapter"
    sought = ("adapter",)
    rank = 3
    pattern = add(value("h"), cast(_shaped))

    def check(self, match: Match, editor: Editor) -> Miss | None:
        down, up, h = match["down"], match["up"], match["h"]
        if not (editor.learns(down) and editor.learns(up) and down.op == up.op == "get_attr"):
            return Miss(match.root, f"{down.target} and {up.target} are no adapter's", (down, up))
        if str(fake(h).shape) != str(fake(match.root).shape) or fake(h).dtype != fake(match.root).dtype:
            return Miss(match.root, f"{h.name} has another shape than the sum", (h,))
        return read_elsewhere(match)

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
        (match,) = matches
        x, h = match["x"], match["h"]
        activation = next(name for name in ("relu", "gelu", "silu", "tanh") if match[name] is not None)
        scale = 1.0 if match["scale"] is None else match["scale"]
        both = editor.emit(
            match, match.root, torch.ops.peftc.adapter.default, x, None if x is h else h, match["down"],
            match["down_bias"], match["up"], match["up_bias"], scale, activation,
        )  # fmt: skip
        result = editor.emit(match, match.root, operator.getitem, both, 0)
        if str(fake(result).shape) != str(fake(match.root).shape):
            result = editor.emit(match, match.root, aten.reshape.default, result, match["shape"])
        return [result]
