"""A linear layer in Triton whose accumulator is scaled before it is written: `lora_linear` without a branch."""

from __future__ import annotations

from torch import Tensor

from peftc.kernels.common.shapes import rows
from peftc.kernels.gpu.launch import TRITON_DTYPES, on_device
from peftc.kernels.gpu.lora_linear import grouped
from peftc.kernels.scaled_linear import smallest


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, length: Tensor, transposed: bool) -> Tensor:
    """As `peftc::scaled_linear`."""
    if x.dtype not in TRITON_DTYPES:
        return NotImplemented
    with on_device(x):
        (y,) = grouped(
            rows(x).contiguous(), None, [weight], [bias], [], [length.contiguous()], [], transposed, smallest(x.dtype)
        )
    return y.view(*x.shape[:-1], y.shape[1])
