"""Prefixes and LLaMA-Adapter against a slow transcription of their formulas, under every spelling of an attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import peftc

torch.set_num_threads(1)
pytestmark = pytest.mark.slow


# ---- A small model with every spelling of an attention -----------------------------------------------------------

SPELLINGS = ("none", "causal", "bool", "additive", "grouped", "tiled", "spelt out", "capped", "folded")


@dataclass(frozen=True)
class Shape:
    """Sizes of the small model; `copies` query heads read one key head."""

    spelling: str
    kv_heads: int
    copies: int
    width: int
    features: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.copies

    def key_head(self, head: int) -> int:
        return head % self.kv_heads if self.spelling == "tiled" else head // self.copies


class Layer(nn.Module):
    """One attention, q, k, v and o of different widths, with the keys' heads copied or not."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        inner, own = shape.heads * shape.width, shape.kv_heads * shape.width
        self.query = nn.Linear(shape.features, inner)
        self.key, self.value = nn.Linear(shape.features, own), nn.Linear(shape.features, own, bias=False)
        self.out = nn.Linear(inner, shape.features)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.shape.width)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return torch.as_tensor(self.out(self.attend(q, k, v, mask[:, None, None, :]).transpose(1, 2).flatten(2)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        spelling, copies = self.shape.spelling, self.shape.copies
        if spelling == "grouped":
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        if spelling == "tiled":
            k, v = k.repeat(1, copies, 1, 1), v.repeat(1, copies, 1, 1)
        else:
            k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
        hidden = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        if spelling in ("none", "tiled"):
            return F.scaled_dot_product_attention(q, k, v)
        if spelling == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if spelling == "bool":
            places = torch.arange(q.shape[-2], device=q.device)
            return F.scaled_dot_product_attention(q, k, v, mask & (places <= places[:, None]))
        if spelling == "additive":
            return F.scaled_dot_product_attention(q, k, v, hidden.expand(-1, -1, q.shape[-2], -1), scale=0.5)
        if spelling == "spelt out":
            scores = q @ k.transpose(-1, -2) / math.sqrt(self.shape.width) + hidden
            return scores.softmax(-1) @ v
        if spelling == "capped":
            scores = torch.tanh(q @ k.transpose(-1, -2) / 3) * 3
            return scores.masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1) @ v
        batch, heads, tokens, _ = q.shape
        q, k, v = (part.reshape(batch * heads, tokens, -1) for part in (q, k, v))
        scores = torch.baddbmm(hidden.expand(-1, heads, -1, -1).flatten(0, 1), q, k.transpose(1, 2), alpha=0.25)
        return torch.bmm(scores.softmax(-1), v).view(batch, heads, tokens, -1)


class Small(nn.Module):
    """Two such layers, each with its residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, shape.features)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(2))
        self.head = nn.Linear(shape.features, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x, mask)
        return torch.as_tensor(self.head(x))


# ---- The formulas, one query and one head at a time ---------------------------------------------------------------


def score(shape: Shape, q: Tensor, k: Tensor) -> Tensor:
    """What this spelling makes of one query and one key."""
    product = (q * k).sum()
    if shape.spelling == "capped":
        return 3 * torch.tanh(product / 3)
    if shape.spelling == "additive":
        return product * 0.5
    return product * 0.25 if shape.spelling == "folded" else product / math.sqrt(shape.width)


def is_seen(shape: Shape, mask: Tensor, batch: int, query: int, key: int) -> bool:
    if shape.spelling in ("none", "tiled"):
        return True
    if shape.spelling == "causal":
        return key <= query
    return bool(mask[batch, key]) and (shape.spelling != "bool" or key <= query)


def weighted(scores: list[Tensor], values: list[Tensor]) -> Tensor:
    """softmax(scores) values, by its definition."""
    exponentials = [torch.exp(one - max(scores)) for one in scores]
    total = torch.stack(exponentials).sum()
    return torch.stack([e / total * v for e, v in zip(exponentials, values, strict=True)]).sum(0)


def slow_attention(layer: Layer, x: Tensor, mask: Tensor, keys: Tensor, values: Tensor, gates: Tensor | None) -> Tensor:
    """[softmax over the added and the own keys] v; with gates: softmax over the own, plus gate times the added's."""
    shape, (batch, tokens, _) = layer.shape, x.shape
    q, k, v = (
        F.linear(x, part.weight, part.bias).reshape(batch, tokens, -1, shape.width)
        for part in (layer.query, layer.key, layer.value)
    )
    keys, values = (flat.reshape(len(flat), shape.kv_heads, shape.width) for flat in (keys, values))
    mixed = torch.zeros(batch, tokens, shape.heads, shape.width, dtype=x.dtype)
    for b in range(batch):
        for i in range(tokens):
            for h in range(shape.heads):
                g = shape.key_head(h)
                seen = [j for j in range(tokens) if is_seen(shape, mask, b, i, j)]
                own = [score(shape, q[b, i, h], k[b, j, g]) for j in seen], [v[b, j, g] for j in seen]
                added = [score(shape, q[b, i, h], p[g]) for p in keys], [p[g] for p in values]
                if gates is None:
                    mixed[b, i, h] = weighted(added[0] + own[0], added[1] + own[1])
                else:
                    gate = gates[h] if len(gates) > 1 else gates[0]
                    mixed[b, i, h] = weighted(*own) + gate * weighted(*added)
    return F.linear(mixed.reshape(batch, tokens, -1), layer.out.weight, layer.out.bias)


def slow(model: Small, ids: Tensor, mask: Tensor, states: list[dict[str, Tensor]]) -> Tensor:
    x = model.embed.weight[ids]
    for layer, state in zip(model.layers, states, strict=True):
        assert isinstance(layer, Layer)
        if "gate" in state:
            keys, values = (
                F.linear(state["prompt"], part.weight, part.bias) for part in (layer.key, layer.value)
            )  # fmt: skip
        else:
            keys, values = state["keys"], state["values"]
        x = x + slow_attention(layer, x, mask, keys, values, state.get("gate"))
    return F.linear(x, model.head.weight, model.head.bias)


def states_of(compiled: peftc.CompiledModule, seed: int = 2) -> list[dict[str, Tensor]]:
    """Random values in all the state, and that state by binding."""
    random = torch.Generator().manual_seed(seed)
    named = dict(compiled.named_parameters())
    with torch.no_grad():
        for tensor in compiled.trainable_parameters().values():
            tensor.copy_(torch.randn(tensor.shape, generator=random, dtype=torch.float64))
    return [{name: named[full] for name, full in binding.names.items()} for binding in compiled.plan.bindings]


@given(
    method=st.sampled_from(["prefix(length={})", "llama_adapter(length={})", "llama_adapter(length={}, gates=head)"]),
    spelling=st.sampled_from(SPELLINGS),
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(2, 5), st.integers(3, 7)),
    length=st.integers(1, 4),
    tokens=st.integers(3, 5),
)
@settings(max_examples=12, phases=(Phase.explicit, Phase.generate), deadline=None, derandomize=True, database=None)
def test_it_is_the_formula(
    method: str, spelling: str, sizes: tuple[int, int, int, int], length: int, tokens: int
) -> None:
    """Outputs and gradients in double precision; another batch and length than those it was compiled with."""
    kv_heads, copies, width, features = sizes
    shape = Shape(spelling, kv_heads, 1 if spelling == "folded" else copies, width, features)
    torch.manual_seed(0)
    model = Small(shape).double()
    ones = torch.ones(2, 6, dtype=torch.bool)
    example = {"ids": torch.zeros(2, 6, dtype=torch.long), "mask": ones}
    compiled = peftc.compile(model, f"apply {method.format(length)} to attn", example=example)
    states = states_of(compiled)
    mask = torch.ones(3, tokens, dtype=torch.bool)
    mask[1, -1] = mask[2, 0] = False
    if spelling == "bool":
        mask[2, 0] = True  # a query that sees nothing has no softmax to compare with
    ids = torch.randint(11, (3, tokens))
    expected, found = slow(model, ids, mask, states), compiled(ids=ids, mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    learnt = list(compiled.trainable_parameters().values())
    weights = torch.linspace(-1, 1, 3, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), learnt)
    for actual, gradient in zip(torch.autograd.grad((found * weights).sum(), learnt), wanted, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-10)
