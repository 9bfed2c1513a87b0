"""Projections that the model itself makes of several layers: one with a branch, and keys that share in the queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import peftc

EXAMPLE = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Attention whose queries and keys are made of both layers, as in Zaya, and a gated layer with a branch of its own
    on its fused weight, as in Zamba 2."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(32, 32) for _ in range(4))
        self.fused, self.close = nn.Linear(32, 96), nn.Linear(48, 32)
        self.narrow, self.wide = nn.Linear(32, 4), nn.Linear(4, 96)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys = self.first(x), self.second(x)
        mean = (queries + keys * 0.5) * 0.5
        heads = [
            y.unflatten(-1, (4, 8)).transpose(1, 2) for y in (queries + mean, keys * 0.5 + mean + mean, self.third(x))
        ]
        x = x + self.last(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        gate, up = (self.fused(x) + self.wide(self.narrow(x))).chunk(2, -1)
        return torch.as_tensor(x + self.close(nn.functional.silu(gate) * up))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_each_layer_has_the_role_that_is_its_own() -> None:
    found = peftc.plan(Model(), "apply lora(r=2) to linear", example=(EXAMPLE,)).sites
    roles = {
        site.name.removeprefix("layers.1."): {role for role in site.roles if role.startswith(("attn.", "mlp."))}
        for site in found
        if site.name.startswith("layers.1.")
    }
    assert {name: held for name, held in roles.items() if held} == {
        "first": {"attn.q"},
        "second": {"attn.k"},
        "third": {"attn.v"},
        "last": {"attn.o"},
        "fused[gate]": {"mlp.gate"},
        "fused[up]": {"mlp.up"},
        "close": {"mlp.down"},
    }
