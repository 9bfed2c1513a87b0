"""A linear layer in Triton whose accumulator is scaled before it is written: `lora_linear` without a branch."""

from __future__ import annotations

from torch import Tensor

from peftc.kernels.gpu.launch import TRITON_DTYPES, on_device
from peftc.kernels.gpu.lora_linear import grouped
from peftc.kernels.scaled_linear import apart_from_zero
from peftc.kernels.shapes import rows, wide


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, length: Tensor, transposed: bool) -> Tensor:
    """As `peftc::scaled_linear`. The kernel adds a bias behind the length: it gets one that is scaled."""
    if x.dtype not in TRITON_DTYPES:
        return NotImplemented
    factor = apart_from_zero(length, x.dtype).to(wide(x.dtype))
    scaled = None if bias is None else bias * factor
    with on_device(x):
        (y,) = grouped(rows(x).contiguous(), None, [weight], [scaled], [], [factor], [], transposed)
    return y.view(*x.shape[:-1], y.shape[1])
