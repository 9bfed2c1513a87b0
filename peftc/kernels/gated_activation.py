"""The inside of a gated feed-forward network: act(gate) * up (Shazeer 2020), without its activation kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftc.kernels.common.activations import activate, activate_into, check, differentiate_
from peftc.kernels.common.operation import on_cuda, operation
from peftc.kernels.common.shapes import like


def reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, elementwise.

    Args:
        gate: [..., d].
        up: as gate.
        activation: one of `activations.ACTIVATIONS`.
    """
    return activate(gate, activation) * up


@operation("gated_activation")
def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Two passes, no temporary."""
    return activate_into(gate, activation, like(gate)).mul_(up)


@gated_activation.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    check(activation)
    return like(gate)


@operation("gated_activation_backward")
def gated_activation_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dgate = grad * up * act'(gate) and dup = grad * act(gate), with no temporary beside the two."""
    return backward_of(grad, gate, up, activate_into(gate, activation, like(gate)), activation)


def again(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(gate) * up, and act(gate) for `backward_of`."""
    activated = activate_into(gate, activation, like(gate))
    return torch.mul(activated, up, out=like(gate)), activated


def backward_of(grad: Tensor, gate: Tensor, up: Tensor, activated: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """As `gated_activation_backward`, with act(gate), which is written over."""
    dgate = torch.mul(grad, up, out=like(gate))
    return differentiate_(dgate, gate, activation), activated.mul_(grad)


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

on_cuda(gated_activation, "gated_activation", "forward")
on_cuda(gated_activation_backward, "gated_activation", "backward")
