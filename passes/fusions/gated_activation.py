"""An activated gate times what it gates: the middle of SwiGLU and its kin."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from peftc.graph.ir import value as fake
from peftc.graph.patterns import either, mul, op, read_elsewhere, value
from peftc.protocol.rule import Editor, Fusion, Match, Miss, fusion

aten = torch.ops.aten

_gate = value("gate")
_activated = either(
    op(aten.silu.default, _gate, name="silu"),
    mul(_gate, op(aten.sigmoid.default, _gate), name="silu"),
    op(aten.gelu.default, _gate, name="gelu"),
    op(aten.gelu.default, _gate, name="gelu", approximate="none"),
    op(aten.gelu.default, _gate, name="gelu_tanh", approximate="tanh"),
    op(aten.relu.default, _gate, name="relu"),
)


@fusion
class GatedActivation(Fusion):
    """f(gate) * up as one operation that keeps gate and up only; f is silu, gelu in either form, or relu."""

    name = "gated_activation"
    rank = 2
    pattern = mul(_activated, value("up"))

    def check(self, match: Match, editor: Editor) -> Miss | None:
        gate, up = fake(match["gate"]), fake(match["up"])
        if str(gate.shape) != str(up.shape) or gate.dtype != up.dtype:
            reason = f"what is gated is {tuple(up.shape)} {up.dtype}, the gate {tuple(gate.shape)} {gate.dtype}"
            return Miss(match.root, reason, (match["up"],))
        return read_elsewhere(match)

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
        (match,) = matches
        activation = next(name for name in ("silu", "gelu", "gelu_tanh", "relu") if match[name] is not None)
        target = torch.ops.peftc.gated_activation.default
        return [editor.emit(match, match.root, target, match["gate"], match["up"], activation)]
