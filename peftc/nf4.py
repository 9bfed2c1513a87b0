"""The numbers of NF4: sixteen values at the quantiles of a normal distribution, times each block's largest magnitude.

Dettmers et al. 2023, arXiv:2305.14314; the values are those of bitsandbytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64


def nf4_rounded(weight: Tensor) -> Tensor:
    """`weight` as it comes back from NF4, in its own dtype: blocks of 64 in memory order, the last may be shorter."""
    flat = weight.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1, keepdim=True)
    values = torch.tensor(VALUES, device=weight.device)
    middles = (values[1:] + values[:-1]) / 2
    nearest = torch.bucketize(blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny), middles)
    return (values[nearest] * absmax).flatten()[: len(flat)].view(weight.shape).to(weight.dtype)
