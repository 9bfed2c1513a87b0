"""Where the search for a role ends: in the residual stream, at a recurrence, at a router; and what is said then."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import JetMoeConfig, JetMoeForCausalLM

import peftc
from peftc.protocol.sites import Sites
from peftc.show import tables
from peftc.show.screen import rendered

WIDTH = 32
EXAMPLE = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(0))


def linear(n_in: int = WIDTH, n_out: int = WIDTH) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=False)


class Mlp(nn.Module):
    """A feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = linear(n_out=48), linear(48)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.down(nn.functional.gelu(self.up(x))))


class Mixer(nn.Module):
    """Two projections around something that mixes tokens."""

    def __init__(self, mix: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.into, self.out, self.mix = linear(n_out=2 * WIDTH), linear(), mix
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.into(x).chunk(2, -1)
        if self.mix is convolved:
            value = self.conv(value.mT)[..., : x.shape[1]].mT
        return torch.as_tensor(self.out(self.mix(value, gate) * nn.functional.silu(gate)))


def convolved(value: Tensor, gate: Tensor) -> Tensor:
    return nn.functional.silu(value)


def scanned(value: Tensor, gate: Tensor) -> Tensor:
    return value.cumsum(1)


def recurrent(value: Tensor, gate: Tensor) -> Tensor:
    """h = f h + (1 - f) v, written out: nothing but arithmetic, as an unrolled loop leaves it."""
    keep, state, states = gate.sigmoid(), torch.zeros_like(value[:, 0]), []
    for token in range(value.shape[1]):
        state = keep[:, token] * state + (1 - keep[:, token]) * value[:, token]
        states.append(state)
    return torch.stack(states, 1)


def linear_attention(value: Tensor, gate: Tensor) -> Tensor:
    return gate @ (gate.mT @ value)


class GatedNorm(nn.Module):
    """A norm, a feed-forward layer, and a gate on the norm that two small products make."""

    def __init__(self, gate: Callable[[Tensor], Tensor] = torch.sigmoid) -> None:
        super().__init__()
        self.norm, self.small, self.wide, self.mlp = nn.LayerNorm(WIDTH), linear(n_out=4), linear(4), Mlp()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return torch.as_tensor(self.mlp(x * self.gate(self.wide(nn.functional.silu(self.small(x))))))


class Attend(nn.Module):
    """Attention of four heads, whose projections, and their result, may be something else."""

    def __init__(self, **instead: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.router = linear(), linear(), linear(), linear(), linear(n_out=2)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.instead: dict[str, Any] = {"q": project_q, "k": project_k, "v": project_v, "o": project_o, **instead}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.instead[name](self, x).unflatten(-1, (4, 8)).transpose(1, 2) for name in "qkv")
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return torch.as_tensor(self.instead["o"](self, mixed))


def project_q(own: Attend, x: Tensor) -> Any:
    return own.q(x)


def project_k(own: Attend, x: Tensor) -> Any:
    return own.k(x)


def project_v(own: Attend, x: Tensor) -> Any:
    return own.v(x)


def project_o(own: Attend, x: Tensor) -> Any:
    return own.o(x)


def routed(own: Attend, x: Tensor) -> Tensor:
    """Rows of x in an order that a router says, as where experts project them."""
    order = own.router(x)[..., 0].argsort(-1)
    return x.gather(1, order[..., None].expand_as(x))


def as_it_is(own: Attend, x: Tensor) -> Tensor:
    return x


def gated_convolution(own: Attend, x: Tensor) -> Any:
    return own.router(x).sigmoid()[..., :1] * own.conv(own.q(x).mT).mT


def with_convolution(own: Attend, x: Tensor) -> Any:
    value = own.v(x)
    return value + own.conv(value.mT).mT


class Layer(nn.Module):
    """Sublayers, each added to the residual stream."""

    def __init__(self, *sublayers: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(make() for make in sublayers)

    def forward(self, x: Tensor) -> Tensor:
        for sublayer in self.parts:
            x = x + sublayer(x)
        return x


class NormedOutside(nn.Module):
    """Layers whose norms and residual sums stand in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.layers = nn.ModuleList(Layer(Mlp) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer.get_submodule("parts.0")(norm(x))
        return x


class Model(nn.Module):
    """Two layers."""

    def __init__(self, *sublayers: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(*sublayers) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def sites(*sublayers: Callable[[], nn.Module]) -> Sites:
    return peftc.sites(Model(*sublayers), example=EXAMPLE)


def roles(found: Sites, layer: int = 1) -> dict[str, str]:
    """The sites of one layer that have a role of attention or a feed-forward layer, named as in their sublayer."""
    prefix = f"layers.{layer}.parts."
    return {
        site.name.removeprefix(prefix): role
        for site in found
        for role in site.roles
        if site.name.startswith(prefix) and role.startswith(("attn.", "mlp."))
    }


def stopped(found: Sites) -> dict[tuple[str, str], str]:
    """What stopped the search for each absent role of the second layer."""
    prefix = "layers.1.parts."
    return {
        (item.name.removeprefix(prefix), item.role): item.operation
        for item in found.absent
        if item.name.startswith(prefix) and item.role
    }


@pytest.mark.parametrize(
    ("mix", "operation"),
    [(convolved, "conv1d"), (scanned, "cumsum"), (recurrent, "mul"), (linear_attention, "matmul")],
)
def test_what_mixes_tokens_is_no_feed_forward_layer(mix: Any, operation: str) -> None:
    found = sites(partial(Mixer, mix), Mlp)
    assert roles(found) == {"1.up": "mlp.up", "1.down": "mlp.down"}
    assert [site.name for site in found if "mlp" in site.roles] == ["layers.0.parts.1", "layers.1.parts.1"]
    assert stopped(found) == {("0.out", "mlp.up"): operation}


@pytest.mark.parametrize("gate", [torch.sigmoid, torch.neg])
def test_a_factor_of_a_norm_is_no_feed_forward_layer(gate: Any) -> None:
    assert roles(sites(partial(GatedNorm, gate))) == {"0.mlp.up": "mlp.up", "0.mlp.down": "mlp.down"}


def test_a_feed_forward_layer_may_be_normed_and_added_outside_of_its_block() -> None:
    assert roles(peftc.sites(NormedOutside(), example=EXAMPLE)) == {"0.up": "mlp.up", "0.down": "mlp.down"}


def test_routed_queries_have_no_role_and_the_router_has_not_theirs() -> None:
    found = sites(partial(Attend, q=routed, o=routed), Mlp)
    assert roles(found) == {"0.k": "attn.k", "0.v": "attn.v", "1.up": "mlp.up", "1.down": "mlp.down"}
    assert stopped(found) == {("0", "attn.q"): "gather", ("0", "attn.o"): "gather"}
    assert not [site for site in found if "attn" in site.roles]


def test_queries_that_nothing_projects_are_not_those_of_the_layer_before() -> None:
    found = sites(Mlp, partial(Attend, q=as_it_is))
    assert "attn.q" not in found.roles()
    (absence,) = [item for item in found.absent if item.role == "attn.q" and item.name.startswith("layers.1.")]
    assert absence.residual
    assert "stopped at the residual stream, `add` of layers.1 (test_absent_roles.py:" in absence.reason


def test_a_gate_is_not_what_a_convolution_hides() -> None:
    assert stopped(sites(partial(Attend, q=gated_convolution))) == {("0", "attn.q"): "conv1d"}


def test_what_is_made_of_a_projection_and_added_to_it_hides_nothing() -> None:
    assert roles(sites(partial(Attend, v=with_convolution)))["0.v"] in ("attn.v", "self.attn.v")


class Gating(nn.Module):
    """Attention with a gate on its result, made by the query's own weight, head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = linear(n_out=2 * WIDTH), linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        q, gate = self.q(x).unflatten(-1, (4, 16)).chunk(2, -1)
        k, v = (layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2).flatten(2)
        return torch.as_tensor(self.o(mixed * gate.flatten(2).sigmoid()))


def test_rows_that_feed_a_gate_are_not_the_querys() -> None:
    found = sites(Gating)
    (query,) = [site for site in found if "attn.q" in site.roles and site.layer == 0]
    assert query.name == "layers.0.parts.0.q[q]"
    assert getattr(query, "rows", None) == tuple(row for row in range(2 * WIDTH) if row % 16 < 8)
    assert roles(found).keys() == {"0.q[q]", "0.k", "0.v", "0.o"}


def test_a_spec_that_asks_for_an_absent_role_is_told_what_stopped_the_search() -> None:
    model = Model(partial(Mixer, scanned), partial(Attend, q=routed))
    with pytest.raises(peftc.PeftcError) as raised:
        peftc.plan(model, "apply lora(r=2) to mlp.down, attn.q", example=EXAMPLE)
    down, query = raised.value.diagnostics
    assert "layers.0.parts.0.out: the search for mlp.up stopped at `cumsum` of layers.0.parts.0" in str(down)
    assert "layers.0.parts.1: the search for attn.q stopped at `gather` of layers.0.parts.1" in str(query)


def test_every_linear_layer_of_a_block_has_a_role_or_a_reason() -> None:
    found = sites(partial(Mixer, scanned), partial(Attend, q=routed), GatedNorm)
    with_role = {f"layers.1.parts.{name}" for name in roles(found)}
    assert {site.name for site in found if "linear" in site.roles and site.layer == 1} == with_role | {
        item.name for item in found.absent if item.name.startswith("layers.1.") and not item.role
    } | {"layers.1.parts.0.out"}
    (router,) = [item for item in found.absent if item.name == "layers.1.parts.1.router"]
    assert router.reason.startswith("its result goes to `argsort` of layers.1.parts.1 (test_absent_roles.py:")
    once, each = (rendered(tables.absences(found, every=every) or "", width=200) for every in (False, True))
    assert "layers.0.parts.1.router  (one of 2)" in once
    assert "layers.1.parts.1.router" in each
    assert "layers.1" not in once


@pytest.mark.slow
def test_queries_of_looped_experts_have_no_role() -> None:
    settings: Any = {"num_key_value_heads": 2, "kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = JetMoeConfig(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, **settings)
    found = peftc.sites(JetMoeForCausalLM(config))
    assert {role for role in found.roles() if role.startswith(("attn.", "mlp."))} == {"attn.k", "attn.v"}
    assert {item.role for item in found.absent} == {"attn.q", "attn.o", ""}


class Weighted(nn.Module):
    """Two feed-forward layers, of which a router says how much each counts: of one in its middle, of one at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.first, self.second = linear(n_out=4), Mlp(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        one, other = (part.logsumexp(-1, keepdim=True) for part in self.router(x).chunk(2, -1))
        middle = nn.functional.gelu(self.first.up(x)) * one
        return torch.as_tensor(self.first.down(middle) + self.second(x) * other)


def test_a_weight_of_each_token_is_no_source_of_features() -> None:
    assert roles(sites(Weighted)) == {
        f"0.{path}.{name}": f"mlp.{name}" for path in ("first", "second") for name in ("up", "down")
    }
