"""Orthogonal matrices out of any, and products with the blocks of a block-diagonal one."""

from __future__ import annotations

import torch
from torch import Tensor


def cayley(skew: Tensor, terms: int | None = None) -> Tensor:
    """(I - Q)(I + Q)^-1 of skew-symmetric Q [..., n, n].

    terms: instead of it (I + Q)(I - Q)^-1 by as many terms of the series I + 2 Q + 2 Q^2 + ..., of which the last is
    halved where there are four or more; three are taken for four.
    """
    one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    if terms is None:
        solved: Tensor = torch.linalg.solve(one + skew, one - skew, left=False)
        return solved
    if terms < 3:
        return one + 2 * skew if terms == 2 else one.expand_as(skew)
    power = skew
    total = one + 2 * skew
    for _ in range(max(terms, 4) - 3):
        power = power @ skew
        total = total + 2 * power
    return total + power @ skew


def skew(above: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices [..., size, size] out of what is above their diagonals [..., size (size - 1) / 2]."""
    row = torch.arange(size, device=above.device)[:, None]
    column = row.t()
    place = (row * (2 * size - 1 - row) >> 1) + column - row - 1  # row by row
    upper = above[..., place.clamp(0, above.shape[-1] - 1)] * (column > row)
    return upper - upper.mT


def in_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """x diag(R_1, ..., R_b): x [..., b n], the blocks [b, n, n]."""
    return torch.einsum("...bi,bij->...bj", x.unflatten(-1, blocks.shape[:2]), blocks).flatten(-2)
