"""Groups of layers: how many layers each gets, which sites they select, and that artifacts keep them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st

import peftc
from paths import EXAMPLES
from peftc.files.artifact import flattened
from peftc.planning.select import Selection
from peftc.protocol.method import methods
from peftc.protocol.site import Site
from peftc.protocol.sites import Sites
from peftc.spec.check import as_spec
from peftc.spec.groups import GROUPINGS
from peftc.spec.resolve import resolve
from zoo import GROUPED, ZOO, inputs

torch.set_num_threads(1)
pytestmark = pytest.mark.slow


# ---- Sizes -------------------------------------------------------------------------------------------------------


@st.composite
def layers_and_groups(draw: st.DrawFn) -> tuple[int, int]:
    groups = draw(st.integers(1, 9))
    return draw(st.integers(groups, 120)), groups


every_grouping = pytest.mark.parametrize("name", GROUPINGS)


@every_grouping
@given(layers_and_groups())
def test_every_layer_is_in_one_group_and_no_group_is_empty(name: str, case: tuple[int, int]) -> None:
    layers, groups = case
    sizes = GROUPINGS[name](layers, groups)
    assert len(sizes) == groups
    assert sum(sizes) == layers
    assert min(sizes) >= 1


def rises(sizes: tuple[int, ...]) -> bool:
    return list(sizes) == sorted(sizes)


@given(layers_and_groups())
def test_shapes(case: tuple[int, int]) -> None:
    """Weakly, as whole layers must: four layers in four groups are one each, whatever the grouping."""
    layers, groups = case
    sizes = {name: grouping(layers, groups) for name, grouping in GROUPINGS.items()}
    assert rises(sizes["increasing"])
    assert sizes["decreasing"] == sizes["increasing"][::-1]
    assert max(sizes["uniform"]) - min(sizes["uniform"]) <= 1
    first, last = (groups + 1) // 2, groups // 2
    assert rises(sizes["spindle"][:first])
    assert rises(sizes["spindle"][last:][::-1])
    assert rises(sizes["bottleneck"][:first][::-1])
    assert rises(sizes["bottleneck"][last:])
    for name in ("spindle", "bottleneck"):
        mirrored = list(zip(sizes[name], sizes[name][::-1], strict=True))
        assert all(abs(one - other) <= 1 for one, other in mirrored)
        if groups % 2 == 0 and layers % 2 == 0:
            assert all(one == other for one, other in mirrored)


@given(st.integers(1, 40))
def test_in_proportion_where_that_is_whole(times: int) -> None:
    assert GROUPINGS["spindle"](6 * times, 4) == (times, 2 * times, 2 * times, times)
    assert GROUPINGS["bottleneck"](6 * times, 4) == (2 * times, times, times, 2 * times)
    assert GROUPINGS["increasing"](10 * times, 4) == (times, 2 * times, 3 * times, 4 * times)
    assert GROUPINGS["uniform"](4 * times, 4) == (times,) * 4


@pytest.mark.parametrize("layers", [12, 24, 30, 32])
def test_four_groups_of_real_models_differ_as_the_paper_has_it(layers: int) -> None:
    """N1 < N2 = N3 > N4, and the other inequalities of its section 4.1, strictly."""
    a, b, c, d = GROUPINGS["spindle"](layers, 4)
    assert a < b == c > d
    a, b, c, d = GROUPINGS["bottleneck"](layers, 4)
    assert a > b == c < d
    a, b, c, d = GROUPINGS["increasing"](layers, 4)
    assert a < b < c < d


# ---- Selecting ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    path: str
    role: str | None
    layers: int


def sites(*stacks: Stack) -> Sites:
    """One q site and one block in every layer, and a head outside of them."""
    items = [Site("head", "head", frozenset({"head"}))]
    for stack in stacks:
        for layer in range(stack.layers):
            block = f"{stack.path}.{layer}"
            place = {"layer": layer, "stack": stack.role, "block": block}
            items.append(Site(block, block, frozenset({"block"}), **place))  # type: ignore[arg-type]
            items.append(Site(f"{block}.q", f"{block}.q", frozenset({"attn.q"}), **place))  # type: ignore[arg-type]
    return Sites("Model", tuple(items))


ONE = sites(Stack("layers", None, 8))
TWO = sites(Stack("encoder.block", "encoder", 4), Stack("decoder.block", "decoder", 8))


def found(model: Sites, selector: str, head: str = "group G1, G2, G3, G4 = spindle(layers)") -> list[str]:
    (training,) = resolve(as_spec(f"{head}\ntrain {selector}")).trainings
    selection = Selection(model)
    result = [site.name for site in selection(training.target)]
    assert not selection.problems, selection.problems
    return result


def layers(path: str, *numbers: int) -> list[str]:
    return [f"{path}.{number}" for number in numbers]


@pytest.mark.parametrize(
    ("model", "selector", "expected"),
    [
        (ONE, "block in G1", layers("layers", 0)),
        (ONE, "block in G2", layers("layers", 1, 2, 3)),
        (ONE, "block in G4", layers("layers", 7)),
        (ONE, "block in G1, block in G4", layers("layers", 0, 7)),
        (ONE, "block except (block in G2, block in G3)", layers("layers", 0, 7)),
        (ONE, "(block, attn.q) & attn.q in G1", ["layers.0.q"]),
        (ONE, "block in G2 in layers[2:]", layers("layers", 2, 3)),
        (ONE, "block in layers[-1:] in G4", layers("layers", 7)),
        (TWO, "block in G2", layers("encoder.block", 1) + layers("decoder.block", 1, 2, 3)),
        (TWO, "block in G2 in encoder", layers("encoder.block", 1)),
        (TWO, "block in decoder in G3", layers("decoder.block", 4, 5, 6)),
    ],
    ids=str,
)
def test_in_a_group(model: Sites, selector: str, expected: list[str]) -> None:
    assert found(model, selector) == expected


def test_names_of_selectors_may_use_groups() -> None:
    head = "group bottom, top = uniform(layers)\nlet last = attn.q in top\nfreeze head"
    specification = as_spec(f"{head}\ntrain last in layers[5:]")
    (_, training) = resolve(specification).trainings
    assert [site.name for site in Selection(ONE)(training.target)] == ["layers.5.q", "layers.6.q", "layers.7.q"]


def test_a_group_that_is_not_used_is_no_mistake() -> None:
    peftc.check("group G1, G2, G3 = bottleneck(layers)\napply lora to attn.q in G1")


def test_a_stack_with_too_few_layers_matters_only_where_something_is_looked_for() -> None:
    model = sites(Stack("encoder.block", "encoder", 8), Stack("decoder.block", "decoder", 2))
    assert found(model, "block in encoder in G1") == layers("encoder.block", 0)


def test_check_needs_no_model() -> None:
    codes = [d.code for d in peftc.check("group lora, G2 = spindel(blocks)\ntrain norm in G3")]
    assert codes == ["name-taken", "unknown-grouping", "unknown-stack"]


# ---- Compiled, saved and loaded ----------------------------------------------------------------------------------


def test_an_artifact_keeps_its_groups(tmp_path: Path) -> None:
    (tmp_path / "groups.peft").write_text("group G1, G2 = uniform(layers)\n")
    spec = tmp_path / "spec.peft"
    spec.write_text('use "groups.peft"\napply lora(r=2) to attn.q in G1\napply adapter(size=4) to mlp in G2\n')

    assert flattened(as_spec(spec)).splitlines()[0] == "group G1, G2 = uniform(layers)"
    base = ZOO["llama"]()
    module = peftc.compile(base, spec)
    names = [binding.site.name for binding in module.plan.bindings]
    assert names == ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp"]
    with torch.no_grad():
        for parameter in module.trainable_parameters().values():
            parameter.normal_(std=0.2)
    module.eval().save(tmp_path / "adapter")
    batch = inputs(base)
    with torch.no_grad():
        loaded = peftc.load(tmp_path / "adapter", base).eval()
        assert torch.equal(loaded(**batch).logits, module(**batch).logits)


@pytest.mark.skipif("prefix" not in methods(), reason="S4 needs prefixes")
def test_s4_trains() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings: dict[str, Any] = {**GROUPED, "num_hidden_layers": 6, "attention_bias": True}
        base = hf.LlamaForCausalLM(hf.LlamaConfig(**settings))
        module = peftc.compile(base, EXAMPLES / "recipes" / "s4.peft")
    batch = inputs(base)
    optimiser = torch.optim.AdamW(module.param_groups(1e-2))
    losses = []
    for _ in range(10):
        optimiser.zero_grad()
        loss = module(**batch).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
