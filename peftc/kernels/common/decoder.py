"""bitsandbytes' own decoder of four-bit weights for the CPU: where it is there, gives the same bits, and is sooner."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor

NAME = "bitsandbytes::dequantize_4bit"
NOTICES = "bitsandbytes.backends.cpu.ops"  # what it says of kernels that are not installed
COLUMNS, ROWS = 4, 2048  # of the sample that both are tried on: blocks a row, and rows for blocks of 64

Decode = Callable[[Tensor, Tensor, Sequence[int]], Tensor]  # packed, absmax in fp32, shape -> dense


@cache
def decoder(levels: str, block: int, dtype: torch.dtype, plain: Decode) -> Decode | None:
    """The decoder for weights whose rows are whole blocks, or None where `plain` is to be taken.

    Args:
        levels: nf4 or fp4.
        block: how many numbers have a scale in common.
        dtype: of the result.
        plain: the definition, for the same arguments. The bits are compared, and which takes longer.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or not native(NAME):
        return None
    operation = torch.ops.bitsandbytes.dequantize_4bit.default

    def theirs(packed: Tensor, absmax: Tensor, shape: Sequence[int]) -> Tensor:
        dense: Tensor = operation(packed, absmax, block, levels, [prod(shape[:-1]), shape[-1]], dtype)
        return dense.view(*shape)

    shape = (max(1, ROWS * 64 // block), COLUMNS * block)
    drawn = torch.Generator().manual_seed(0)
    numbers = shape[0] * shape[1]
    packed = torch.randint(256, (numbers // 2, 1), generator=drawn, dtype=torch.uint8, device="cpu")
    absmax = torch.rand(numbers // block, generator=drawn, device="cpu") + 0.5
    try:
        same = torch.equal(theirs(packed, absmax, shape), plain(packed, absmax, shape))
    except Exception:  # another version may have it otherwise
        return None
    sooner = same and _seconds(theirs, packed, absmax, shape) < _seconds(plain, packed, absmax, shape)
    return theirs if sooner else None


@cache
def native(name: str) -> bool:
    """Whether bitsandbytes has an operation of its own for the CPU."""
    logger = logging.getLogger(NOTICES)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except Exception:  # what its own libraries may raise
        return False
    finally:
        logger.setLevel(before)
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


def _seconds(decode: Decode, packed: Tensor, absmax: Tensor, shape: Sequence[int]) -> float:
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        decode(packed, absmax, shape)
        best = min(best, time.perf_counter() - start)
    return best
