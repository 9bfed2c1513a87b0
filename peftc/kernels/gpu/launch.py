"""How Triton kernels are launched: on the tensors' device, with tiles for its kind."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
TRITON_DTYPES = (*HALVES, torch.float32)


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program of a matrix product does: rows x columns, `depth` of the inner dimension at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def is_amd() -> bool:
    """Whether torch's CUDA devices are AMD's."""
    return torch.version.hip is not None


def product_tile(dtype: torch.dtype, rows: int) -> Tile:
    """For products of `dtype` with so many rows: no register is spilled, and the shared memory is enough.

    Both are known from compiling; the tiles are not tuned, for nothing here was timed on a GPU.
    """
    height = power_of_two(rows, 16, 128 if dtype in HALVES else 64)
    width = 128 if dtype in HALVES and height >= 64 else 64
    warps = 8 if height == 128 else 4
    if is_amd():  # 64 KiB of shared memory
        return Tile(height, width, 32, warps, 2)
    return Tile(height, width, 64 if dtype in HALVES else 32, warps, 3)


def precision(result: torch.dtype) -> str:
    """How fp32 is multiplied: AMD's matrix units know it; NVIDIA's make it of three products in tf32.

    One such product has three bits more than `result` where that is bf16, and as many where it is fp16.
    """
    if is_amd():
        return "ieee"
    return "tf32" if result in HALVES else "tf32x3"


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two that is no less than `size`, within bounds."""
    return min(max(int(triton.next_power_of_2(size)), least), most)


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
