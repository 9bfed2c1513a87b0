"""Activation functions by name, written where the caller says, and their derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "tanh", "identity")


def check(activation: str) -> None:
    """Raises ValueError for a function that is none of ACTIVATIONS; `gelu_tanh` is GELU's approximation by a tanh."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, not {activation!r}")


def activate(x: Tensor, activation: str) -> Tensor:
    """act(x)."""
    check(activation)
    if activation == "identity":
        return x
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate=_approximation(activation))
    if activation == "tanh":
        return torch.tanh(x)
    return F.silu(x) if activation == "silu" else F.relu(x)


def activate_into(x: Tensor, activation: str, out: Tensor) -> Tensor:
    """act(x), written to `out`."""
    check(activation)
    if activation == "silu":
        aten.silu.out(x, out=out)
    elif activation == "relu":
        torch.clamp_min(x, 0, out=out)
    elif activation == "tanh":
        torch.tanh(x, out=out)
    elif activation == "identity":
        out.copy_(x)
    else:
        aten.gelu.out(x, approximate=_approximation(activation), out=out)
    return out


def differentiate_(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """grad * act'(x), written to grad."""
    check(activation)
    if activation == "silu":
        aten.silu_backward.grad_input(grad, x, grad_input=grad)
    elif activation == "relu":
        aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)
    elif activation == "tanh":
        aten.tanh_backward.grad_input(grad, torch.tanh(x), grad_input=grad)
    elif activation != "identity":
        aten.gelu_backward.grad_input(grad, x, approximate=_approximation(activation), grad_input=grad)
    return grad


def _approximation(activation: str) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"
