"""The inside of a gated feed-forward network: act(gate) * up (Shazeer 2020), without its activation kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F

from peftc.kernels.shapes import like

aten = torch.ops.aten
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, elementwise.

    Args:
        gate: [..., d].
        up: as gate.
        activation: one of ACTIVATIONS; `gelu_tanh` is GELU's approximation by a tanh.
    """
    return activate(gate, activation) * up


def check(activation: str) -> None:
    """Raises ValueError for a function that is none of ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, not {activation!r}")


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation function by its name."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def activate_(x: Tensor, activation: str, out: Tensor) -> Tensor:
    """The same, written to `out`, which may be x."""
    check(activation)
    if activation == "silu":
        aten.silu.out(x, out=out)
    elif activation == "relu":
        torch.clamp_min(x, 0, out=out)
    else:
        aten.gelu.out(x, approximate="tanh" if activation == "gelu_tanh" else "none", out=out)
    return out


def differentiate_(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """grad * act'(x), written to grad."""
    if activation == "silu":
        aten.silu_backward.grad_input(grad, x, grad_input=grad)
    elif activation == "relu":
        aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=grad)
    return grad


@custom_op("peftc::gated_activation", mutates_args=(), device_types="cpu")
def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Two passes, no temporary."""
    return activate_(gate, activation, like(gate)).mul_(up)


@gated_activation.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    check(activation)
    return like(gate)


@custom_op("peftc::gated_activation_backward", mutates_args=(), device_types="cpu")
def gated_activation_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dgate = grad * up * act'(gate) and dup = grad * act(gate), with no temporary beside the two."""
    dup = activate_(gate, activation, like(gate)).mul_(grad)
    dgate = torch.mul(grad, up, out=like(gate))
    return differentiate_(dgate, gate, activation), dup


@gated_activation_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return like(gate), like(gate)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    gate, up = ctx.saved_tensors
    dgate, dup = torch.ops.peftc.gated_activation_backward(grad, gate, up, ctx.activation)
    return dgate, dup, None


gated_activation.register_autograd(_backward, setup_context=_save)
