"""bitsandbytes' product of few bf16 rows and a four-bit weight, which reads packed bytes: for CPUs that it has one for.

It wants the codes of 32 outputs beside each other, and so a copy of the packed weight.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftc.kernels.common.decoder import native
from peftc.kernels.dequantize import dequantize_4bit, levels_of

NAME = "bitsandbytes::gemv_4bit"
OUTPUTS = 32
CLOSE = 1 / 64  # of the length of the result: bf16 has an eighth of it in each number


class Turned(NamedTuple):
    """Codes as `product` reads them: [n_out, n_in / 2], and scales [n_in / block, n_out] in bf16."""

    codes: Tensor
    absmax: Tensor
    block: int
    levels: Tensor


def turned(packed: Tensor, absmax: Tensor, levels: Tensor, block: int, shape: tuple[int, int]) -> Turned:
    """The weight of `shape`, whose n_out is a multiple of 32 and n_in one of `block`.

    Args:
        packed: uint8 [n_out * n_in / 2, 1], as `dequantize_4bit` takes it.
        absmax: fp32 [n_out * n_in / block].
        levels: fp32 [16].
        block: how many numbers have a scale in common.
        shape: [n_out, n_in].
    """
    n_out, n_in = shape
    first, second = packed.view(n_out // OUTPUTS, 2, OUTPUTS // 2, n_in // 2).unbind(1)
    high = (first >> 4) | (second & 0xF0)
    low = (first & 0xF) | (second << 4)
    codes = torch.stack([high, low], -1).permute(0, 2, 1, 3).reshape(n_out, n_in // 2)
    return Turned(codes, absmax.view(n_out, n_in // block).t().to(torch.bfloat16).contiguous(), block, levels)


def product(rows: Tensor, weight: Turned) -> Tensor:
    """rows [m, n_in] bf16 times Wᵀ: [m, n_out]."""
    n_out, half = weight.codes.shape
    found: Tensor = torch.ops.bitsandbytes.gemv_4bit.default(
        rows, weight.codes, [n_out, 2 * half], weight.absmax, weight.levels, weight.block
    )
    return found


@cache
def there_is(levels: str, block: int) -> bool:
    """Whether the product is there, and right: tried on a weight at random."""
    if not native(NAME):
        return False
    drawn: Any = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}
    shape = (2 * OUTPUTS, 3 * block)
    packed = torch.randint(256, (shape[0] * shape[1] // 2, 1), dtype=torch.uint8, **drawn)
    absmax = torch.rand(shape[0] * 3, **drawn) + 0.5
    rows = torch.randn(2, shape[1], **drawn).bfloat16()
    dense = dequantize_4bit(packed, absmax, None, None, levels, block, shape, torch.float32)
    wanted = rows.float() @ dense.t()
    try:
        found = product(rows, turned(packed, absmax, levels_of(levels, torch.device("cpu")), block, shape))
    except Exception:  # another version may have it otherwise
        return False
    return bool((found.float() - wanted).norm() <= CLOSE * wanted.norm())
