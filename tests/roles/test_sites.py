"""Sites and roles, found by data flow, against the tables of `zoo.py`; those tables against the models."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import peftc
from zoo import EXPECTED, FUSED_ROWS, ZOO, inputs

# One worker of pytest-xdist gets all tests of a model: it captures the model once, see `sites_of`.
QUICK = ("llama", "gpt2", "bert")
MODELS = [
    pytest.param(name, marks=[pytest.mark.xdist_group(name), *([] if name in QUICK else [pytest.mark.slow])])
    for name in ZOO
]
LAYERS = (0, 1)
PREFIXES = ("attn.", "self.attn.", "cross.attn.", "mlp.")
FUSED_QKV = {name: key[:-3] for name, rows in FUSED_ROWS.items() for key in rows if key.endswith("[q]")}
FUSED_MLP = {name: key[:-4] for name, rows in FUSED_ROWS.items() for key in rows if key.endswith("[up]")}


@cache
def sites_of(name: str) -> tuple[Any, ...]:
    """The sites of one zoo model: capturing takes seconds, so every test of a process shares them."""
    return tuple(peftc.sites(ZOO[name]()))


def in_layer(name: str, layer: int) -> str:
    """A layer-0 site's name in another layer. In T5's `block.0.layer.0` the first number counts layers."""
    return name.replace(".0.", f".{layer}.", 1)


def projections(site: Any) -> set[str]:
    """Roles of the kind that EXPECTED lists, without `norm`, `bias`, `linear` and the modules."""
    return {role for role in site.roles if role.startswith(PREFIXES)}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", MODELS)
def test_roles_are_carried_by_exactly_the_expected_sites(name: str, layer: int) -> None:
    found: dict[str, list[str]] = {}
    for site in sites_of(name):
        if site.layer == layer:
            for role in projections(site):
                found.setdefault(role, []).append(site.name)
    expected = {role: sorted(in_layer(site, layer) for site in names) for role, names in EXPECTED[name].items()}
    assert {role: sorted(names) for role, names in found.items()} == expected


@pytest.mark.parametrize("name", MODELS)
def test_no_site_outside_the_layers_has_a_projection_role(name: str) -> None:
    """RoBERTa's and DistilBERT's heads are two linears around an activation, and yet no MLP of a layer."""
    assert {site.name: projections(site) for site in sites_of(name) if site.layer is None and projections(site)} == {}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_fused_weights(name: str, layer: int) -> None:
    found = {
        site.name: list(site.rows)
        for site in sites_of(name)
        if site.layer == layer and projections(site) and site.rows is not None
    }
    assert found == {in_layer(site, layer): rows for site, rows in FUSED_ROWS.get(name, {}).items()}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_the_weights(name: str) -> None:
    model = ZOO[name]()
    checked = set()
    for site in sites_of(name):
        if projections(site):
            n_in, n_out = shape(model, site.name.partition("[")[0])
            assert (site.n_in, site.n_out) == (n_in, n_out if site.rows is None else len(site.rows)), site.name
            checked.add(site.name)
    assert checked == {in_layer(site, layer) for role in EXPECTED[name].values() for site in role for layer in LAYERS}


@pytest.mark.parametrize("name", MODELS)
def test_stacks(name: str) -> None:
    two = ZOO[name]().config.is_encoder_decoder
    for site in sites_of(name):
        if projections(site):
            stacks = [stack for stack in ("encoder", "decoder") if f"{stack}." in site.name]
            assert site.stack == (stacks[0] if two else None), site.name


@pytest.mark.parametrize("name", MODELS)
def test_names_are_unique(name: str) -> None:
    names = [site.name for site in sites_of(name)]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("name", [model for model in MODELS if "experts" in str(EXPECTED[str(model.values[0])])])
def test_stacked_experts_are_marked_and_their_router_and_what_is_shared_are_not(name: str) -> None:
    marked = {site.name for site in sites_of(name) if site.layer == 0 and "expert" in site.roles}
    stacked = {path for names in EXPECTED[name].values() for path in names if ".experts." in path}
    assert marked == stacked | {path.partition("[")[0] for path in stacked}


class Attend(nn.Module):
    """Attention from one sequence to another, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (
            layer(y).unflatten(-1, (4, 8)).transpose(1, 2)
            for layer, y in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return torch.as_tensor(x + self.o(mixed))


class Pooling(nn.Module):
    """Self attention, and then attention to every second row of what a linear layer makes of the block's input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.memory = Attend(), Attend(), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.second(self.first(x, x), self.memory(x)[:, ::2]))


def test_what_stands_behind_another_attention_of_its_block_is_cross_attention() -> None:
    """Alike in all blocks, the first one's input being the model's own."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Pooling() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    found = peftc.plan(Model(), "apply lora(r=2) to linear", example=(torch.randn(2, 6, 32),)).sites
    kinds = {site.name: sorted(role for role in site.roles if "attn.q" in role) for site in found}
    for layer in LAYERS:
        assert kinds[f"layers.{layer}.first.q"] == ["attn.q", "self.attn.q"]
        assert kinds[f"layers.{layer}.second.q"] == ["attn.q", "cross.attn.q"]


# The tables themselves, by experiment.


def shape(model: PreTrainedModel, path: str) -> tuple[int, int]:
    """(input features, output features) of the linear layer, or stack of experts, at `path`."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        experts = model.get_parameter(path)
        n_out, n_in = experts.shape[1:]
        return (n_out, n_in) if stored_transposed(model, path) else (n_in, n_out)
    assert isinstance(module, nn.Linear | Conv1D)
    weight = module.weight
    return (weight.shape[0], weight.shape[1]) if isinstance(module, Conv1D) else (weight.shape[1], weight.shape[0])


def stored_transposed(model: PreTrainedModel, path: str) -> bool:
    """Whether a stack of experts is [experts, in, out]: by its class, as it is written in the modelling code."""
    return type(model.get_submodule(path.rpartition(".")[0])).__name__ in ("GptOssExperts", "Llama4TextExperts")


def seen_by(model: PreTrainedModel, reader: str, length: int, weight: str, change: Callable[[Tensor], None]) -> Tensor:
    """The input of the layer `reader`, [length, features], when `change` edits the output of `weight`."""
    seen = []

    def edit(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
        output = output.clone()
        change(output)
        return output

    def note(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0].detach().reshape(length, -1))

    hooks = [
        model.get_submodule(weight).register_forward_hook(edit),
        model.get_submodule(reader).register_forward_pre_hook(note),
    ]
    with torch.no_grad():
        model(**inputs(model, batch=1, length=length))
    for hook in hooks:
        hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", FUSED_QKV)
def test_oracle_of_fused_attention_rows(name: str) -> None:
    """A row is a value if one lone token sees it, a query if it moves only its own token, and else a key."""
    model = ZOO[name]().eval()
    weight = FUSED_QKV[name]
    (output,) = EXPECTED[name]["attn.o"]
    position = 2  # with two tokens before it and one after it

    def moved(row: int, length: int, at: int) -> list[int]:
        def change(features: Tensor) -> None:
            features[0, at, row] += 3.0

        before = seen_by(model, output, length, weight, lambda _features: None)
        after = seen_by(model, output, length, weight, change)
        return (before - after).abs().amax(dim=1).gt(1e-6).nonzero().flatten().tolist()

    found: dict[str, list[int]] = {"q": [], "k": [], "v": []}
    for row in range(shape(model, weight)[1]):
        if moved(row, length=1, at=0):
            found["v"].append(row)
        elif moved(row, length=4, at=position) == [position]:
            found["q"].append(row)
        else:
            found["k"].append(row)
    assert found == {part: FUSED_ROWS[name][f"{weight}[{part}]"] for part in found}


@pytest.mark.parametrize("name", FUSED_MLP)
def test_oracle_of_fused_gate_rows(name: str) -> None:
    """An up row enters the layer's output linearly; a gate row goes through the activation first."""
    model = ZOO[name]().eval()
    weight = FUSED_MLP[name]
    block, _, _ = weight.rpartition(".")
    try:
        tensor = model.get_submodule(weight).weight
    except AttributeError:
        tensor = model.get_parameter(weight)
        tensor = tensor.transpose(1, 2) if stored_transposed(model, weight) else tensor
    hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    hidden *= 0.5 if name == "gpt_oss" else 1  # or some rows reach what it clamps to

    def outputs(row: int) -> list[Tensor]:
        """The block's output with the row scaled by 1, 11 and 21."""
        found = []
        with torch.no_grad():
            original = tensor[..., row, :].clone()
            for scale in (1.0, 11.0, 21.0):
                tensor[..., row, :] = scale * original
                found.append(run(model.get_submodule(block), hidden))
            tensor[..., row, :] = original
        return found

    found: dict[str, list[int]] = {"gate": [], "up": []}
    for row in range(tensor.shape[-2]):
        one, two, three = outputs(row)
        change, bend = (two - one).abs().max(), (one - 2 * two + three).abs().max()
        assert change > 1e-5  # of outputs below 1e-2, whose rounding is below 1e-9
        found["up" if bend < 1e-4 * change else "gate"].append(row)
    assert found == {part: FUSED_ROWS[name][f"{weight}[{part}]"] for part in found}


def run(block: nn.Module, hidden: Tensor) -> Tensor:
    """An MLP's output; for a stack of experts, with every token sent to two of them."""
    if "Experts" not in type(block).__name__:
        output: Tensor = block(hidden)
        return output
    tokens = hidden[0]
    if "Llama4" in type(block).__name__:  # all four of them
        output = block(tokens.repeat(4, 1))
        return output
    chosen = torch.stack([torch.arange(len(tokens)) % 4, (torch.arange(len(tokens)) + 1) % 4], dim=1)
    output = block(tokens, chosen, torch.full(chosen.shape, 0.5, dtype=tokens.dtype))
    return output
