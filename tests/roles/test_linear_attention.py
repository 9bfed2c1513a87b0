"""Roles in attention without a softmax: queries, keys and values are told by what is multiplied with what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import peftc

WIDTH, HEADS, TOKENS = 12, 2, 8


class Retention(nn.Module):
    """(q kᵀ * decay) v, of one projection whose features go through a short convolution side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.conv = nn.Conv1d(3 * WIDTH, 3 * WIDTH, 3, padding=2, groups=3 * WIDTH)
        self.rate = nn.Linear(WIDTH, HEADS)
        self.out = nn.Linear(WIDTH, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        mixed = self.conv(self.qkv(x).transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return tuple(part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in mixed.chunk(3, -1))

    def weigh(self, x: Tensor) -> Tensor:
        rates = nn.functional.softplus(self.rate(x)).transpose(1, 2).cumsum(-1)
        return (rates.unsqueeze(-2) - rates.unsqueeze(-1)).tril().exp().tril()

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        return (q @ k.transpose(-1, -2) * self.weigh(x)) @ v

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.out(self.attend(x).transpose(1, 2).flatten(-2)))


class Delta(Retention):
    """What values change of what is remembered depends on keys: by a triangular system."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        system = (k @ k.transpose(-1, -2) * self.weigh(x)).tril(-1)
        values: Tensor = torch.linalg.solve_triangular(system, v, upper=False, unitriangular=True)
        return (q @ k.transpose(-1, -2) * self.weigh(x)) @ values


class ByFeature(Retention):
    """Each feature has a decay of its own, so the products of queries and keys are no product of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Linear(WIDTH, WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        rates = self.rate(x).sigmoid().cumsum(1).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        decay: Tensor = (rates.unsqueeze(-3) - rates.unsqueeze(-2)).exp()
        return (q.unsqueeze(-2) * k.unsqueeze(-3) * decay).sum(-1).tril() @ v


class Associated(Retention):
    """Products of three matrices, by which nothing is weighed: no attention."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        return q @ k.transpose(-1, -2) @ v


def roles(block: type[Retention]) -> dict[str, set[str]]:
    model = nn.Sequential(block(), block())
    found = peftc.sites(model, example=torch.randn(2, TOKENS, WIDTH))
    return {
        site.name: {role for role in site.roles if role.startswith("attn.")}
        for site in found
        if site.name.startswith("0.") and any(role.startswith("attn.") for role in site.roles)
    }


@pytest.mark.parametrize("block", [Retention, Delta, ByFeature])
def test_each_has_its_rows(block: type[Retention]) -> None:
    assert roles(block) == {**{f"0.qkv[{letter}]": {f"attn.{letter}"} for letter in "qkv"}, "0.out": {"attn.o"}}


def test_what_is_not_weighed_is_none() -> None:
    assert roles(Associated) == {}


def test_methods_of_projections_stand_there_and_methods_of_attention_do_not() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Delta(), Delta()), torch.randn(2, TOKENS, WIDTH)
    compiled = peftc.compile(model, "apply lora(r=2) to attn.*", example=x)
    torch.testing.assert_close(compiled(x), model(x))
    with pytest.raises(peftc.PeftcError, match="matches no"):
        peftc.compile(model, "apply prefix(length=2) to attn", example=x)
