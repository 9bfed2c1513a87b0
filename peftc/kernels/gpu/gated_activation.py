"""act(gate) * up in Triton, forward and backward, elementwise."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from peftc.kernels.common.activations import check
from peftc.kernels.gpu.launch import TRITON_DTYPES, on_device

BLOCK = 1024


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x) and act'(x) in fp32."""
    if ACTIVATION == "silu":
        s = sigmoid(x)
        value, slope = x * s, s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "relu":
        value, slope = tl.maximum(x, 0.0), tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "tanh":
        value = 2.0 * sigmoid(2.0 * x) - 1.0
        slope = 1.0 - value * value
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        value, slope = x * share, share + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        t = 2.0 * sigmoid(2.0 * inner) - 1.0
        value = 0.5 * x * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    else:
        value, slope = x, tl.full(x.shape, 1.0, tl.float32)
    return value, slope


@triton.jit
def forward_kernel(gate, up, y, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    value, _ = activate(tl.load(gate + index, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    value = value.to(y.dtype.element_ty).to(tl.float32)  # rounded as the activation's own output is
    value = value * tl.load(up + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + index, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(grad, gate, up, dgate, dup, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    dy = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)
    value, slope = activate(tl.load(gate + index, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    factor = tl.load(up + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(dgate + index, (dy * factor * slope).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + index, (dy * value).to(dup.dtype.element_ty), mask=inside)


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """As `peftc::gated_activation`."""
    check(activation)
    if gate.dtype not in TRITON_DTYPES:
        return NotImplemented
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    if gate.numel():
        with on_device(gate):
            forward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
                gate, up, y, gate.numel(), ACTIVATION=activation, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
            )
    return y


def backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """As `peftc::gated_activation_backward`."""
    if gate.dtype not in TRITON_DTYPES:
        return NotImplemented
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        with on_device(gate):
            backward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
                grad,
                gate,
                up,
                dgate,
                dup,
                gate.numel(),
                ACTIVATION=activation,
                BLOCK=BLOCK,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return dgate, dup
