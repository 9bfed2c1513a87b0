"""Norms and gates of few numbers, where what costs is how many operations there are."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from peftc.graph.ir import value
from peftc.kernels.common.activations import activate

# Of which a norm's mean is computed in the numbers themselves.
WIDE = (torch.float32, torch.float64)


@cache
def _number(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(number, dtype=dtype, device=device)


def normed(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor]:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, all of one dtype, float32 or wider."""
    norm = torch.linalg.vector_norm(x, 2, -1, True)
    rstd = torch.addcmul(_number(eps, x.dtype, x.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    y = torch.mul(x, rstd)
    return (y if weight is None else y.mul_(weight),)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up."""
    return activate(gate, activation).mul_(up) if activation != "identity" else gate * up


def fewer_operations(graph: fx.Graph) -> None:
    """Rewrites norms and gates in place; the root that a norm keeps for its gradient is not computed."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.peftc.rms_norm.default):
        given: Any = node.args
        x, weight, eps, _ = given
        kinds = {value(part).dtype for part in (x, weight) if part is not None}
        if len(kinds) == 1 and kinds <= {*WIDE} and all(user.args[1] == 0 for user in node.users):
            node.target, node.args = normed, (x, weight, eps)
    for node in graph.find_nodes(op="call_function", target=torch.ops.peftc.gated_activation.default):
        node.target = gated
