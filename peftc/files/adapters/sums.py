"""Adapters as numbers: several low-rank branches at one place made one, scaled by 1.

As HF PEFT's `add_weighted_adapter`, with its names, but for `svd`, which is made of the thin matrices alone. Of these
only `cat` is the weighted sum of the changes themselves, and `svd` what is nearest to that in a given rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HOWS = ("linear", "cat", "svd", "ties", "dare", "magnitude_prune")
SPARSE = ("ties", "dare", "magnitude_prune")  # which keep a part of the numbers


@dataclass(frozen=True)
class Pair:
    """scale B A: A [*batch, r, n_in], B [*batch, n_out, r]."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return int(self.a.shape[-2])


@dataclass(frozen=True)
class How:
    """How pairs are combined.

    Args:
        name: of `HOWS`.
        density: the part of its numbers that each matrix keeps, of `SPARSE`: the largest, or with dare random ones.
        rank: of the result, for svd.
        generator: of dare's random choice.
    """

    name: str
    density: float = 1.0
    rank: int = 0
    generator: torch.Generator | None = None

    def combined(self, pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
        """One pair for several, of which each counts by its weight; the ranks are alike but with cat and svd."""
        dtype = pairs[0].a.dtype
        pairs = [Pair(pair.a.float(), pair.b.float(), pair.scale) for pair in pairs]
        factors = [weight * pair.scale for weight, pair in zip(weights, pairs, strict=True)]
        if self.name == "cat":
            a, b = _side_by_side(pairs, factors)
        elif self.name == "svd":
            a, b = _nearest(*_side_by_side(pairs, factors), self.rank)
        else:  # each side by itself: the sign of a weight is A's alone, or it would be lost
            roots = torch.tensor([math.sqrt(abs(factor)) for factor in factors])
            signs = torch.tensor([-1.0 if factor < 0 else 1.0 for factor in factors])
            a = self._summed([pair.a for pair in pairs], roots * signs)
            b = self._summed([pair.b for pair in pairs], roots)
        return Pair(a.to(dtype), b.to(dtype), 1.0)

    def _summed(self, tensors: list[Tensor], weights: Tensor) -> Tensor:
        """The weighted sum of tensors of one shape, each of which has lost what `name` takes."""
        kept = torch.stack([self._thinned(tensor) for tensor in tensors])
        weighted = kept * weights.view(-1, *[1] * (kept.dim() - 1))
        if self.name != "ties":
            return weighted.sum(0)
        agreeing = kept.sign() == torch.where(kept.sum(0) >= 0, 1, -1)  # TIES, Yadav 2023, arXiv:2306.01708
        return (weighted * agreeing).sum(0) / agreeing.sum(0).clamp_min(1)

    def _thinned(self, tensor: Tensor) -> Tensor:
        if self.name not in SPARSE or self.density >= 1:
            return tensor
        if self.name == "dare":  # Yu 2023, arXiv:2311.03099
            chance = torch.full_like(tensor, self.density)
            return tensor * torch.bernoulli(chance, generator=self.generator) / self.density
        mask = torch.zeros_like(tensor).flatten()
        mask[tensor.abs().flatten().topk(int(self.density * tensor.numel())).indices] = 1
        return tensor * mask.view_as(tensor)


def _side_by_side(pairs: Sequence[Pair], factors: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A and B whose product is the weighted sum of all products."""
    a = torch.cat([factor * pair.a for factor, pair in zip(factors, pairs, strict=True)], -2)
    return a, torch.cat([pair.b for pair in pairs], -1)


def _nearest(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of B A in a rank, by a decomposition of its core, as small as A's rows are few."""
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.mT)
    u, s, v = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    return v[..., :rank, :] @ right.mT, left @ (u[..., :rank] * s[..., None, :rank])
