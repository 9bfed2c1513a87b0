"""Numbers that a seed alone determines, on any device, as HF PEFT draws them: a folder need not hold them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kaiming_uniform(tensor: Tensor, *, seed: int, behind: int = 0) -> Tensor:
    """Fills `tensor` [rows, n_in] with those that follow the first `behind` ones of the seed."""
    generator = torch.Generator().manual_seed(seed)
    bound = math.sqrt(6 / tensor.shape[1])
    torch.empty(behind).uniform_(generator=generator)
    return tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))


def permutation(places: Tensor, *, seed: int, below: int) -> Tensor:
    """Fills `places` with the first of a permutation of the numbers `below` one."""
    return places.copy_(torch.randperm(below, generator=torch.Generator().manual_seed(seed))[: len(places)])
