"""Kinds of site with a file of their own: what their `find` has to say of a site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest
import torch
import transformers as hf
from torch import Tensor, fx, nn

import peftc
from peftc.protocol import sites
from peftc.protocol.method import State
from peftc.protocol.params import registry
from peftc.protocol.site import Site
from peftc.protocol.stages import SublayerMethod
from peftc.spec import resolve

EXAMPLE = {"x": torch.ones(2, 3)}


class Twice(nn.Module):
    """A layer before and behind its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(self.layer(x).relu())).relu()


@dataclass(frozen=True, eq=False, repr=False)
class Activation(Site):
    x: fx.Node | None = None
    y: fx.Node | None = None

    kind = "activation"
    own_roles = ("activation",)

    @classmethod
    def find(cls, module: fx.GraphModule, names: Mapping[str, list[str]]) -> Iterator[Site]:
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
            yield cls(cls.called(node), "", frozenset({"activation"}), x=node.all_input_nodes[0], y=node)

    def reads(self) -> tuple[fx.Node, ...]:
        return () if self.x is None else (self.x,)

    def changes(self) -> tuple[fx.Node, ...]:
        return () if self.y is None else (self.y,)

    @classmethod
    def called(cls, node: fx.Node) -> str:
        return node.name


class Alike(Activation):
    @classmethod
    def called(cls, node: fx.Node) -> str:
        return "layer"


class Roleless(Activation):
    own_roles = ("another",)


class Around(SublayerMethod):
    """Adds what enters to what leaves."""

    name = "around"
    formula = "y + v x"
    site = Activation
    unmergeable = "it has no weight"

    def state(self, site: Site) -> dict[str, State]:
        return {"v": State((), torch.nn.init.ones_)}

    def rewrite(self, site: Site, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return y + v * x


def test_a_method_there_is_given_what_others_have_made_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the place needs no parameter of its own for the method's to learn beside."""
    monkeypatch.setattr(sites, "site_kinds", lambda: (Activation,))
    monkeypatch.setattr(resolve, "site_kinds", lambda: (Activation,))
    monkeypatch.setitem(registry("methods").known, "around", Around)
    model, x = Twice().requires_grad_(False), torch.randn(2, 3)
    compiled = peftc.compile(model, "apply ia3 to head\napply around to activation", example=EXAMPLE)
    (scale,) = (tensor for name, tensor in compiled.trainable_parameters().items() if ".ia3." in name)
    torch.nn.init.constant_(scale, -2.0)
    inside = -2 * model.layer(x)
    outside = -2 * model.layer(inside.relu() + inside)
    torch.testing.assert_close(compiled(x), outside.relu() + outside)
    assert compiled.plan.memory(batch=2).weights == 4 * sum(tensor.numel() for tensor in compiled.parameters())


def test_they_stand_behind_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "site_kinds", lambda: (Activation,))
    assert [site.name for site in peftc.sites(Twice(), example=EXAMPLE)] == ["layer", "layer.bias", "relu", "relu_1"]


def test_a_name_is_unique_and_a_role_is_the_kinds_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "site_kinds", lambda: (Alike,))
    with pytest.raises(ValueError, match=r"Alike.find calls a site 'layer', as another is called"):
        peftc.sites(Twice(), example=EXAMPLE)
    monkeypatch.setattr(sites, "site_kinds", lambda: (Roleless,))
    with pytest.raises(ValueError, match=r"Roleless.find gives relu no role of another"):
        peftc.sites(Twice(), example=EXAMPLE)


def test_an_activation_may_have_parameters_of_its_own() -> None:
    """Apertus' xIELU: softplus makes numbers of its parameters, and clips what it sees from above."""
    config = hf.ApertusConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = hf.ApertusForCausalLM(config).float()
    plan = peftc.plan(model, "apply lora(r=2) to mlp.up\napply lora(r=2) to mlp.down")
    found = [binding.site.name for binding in plan.bindings]
    assert found == ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
