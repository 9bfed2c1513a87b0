"""Blocks that run more than once: what cannot be one call stays unfolded, and the model computes what it did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import peftc
from peftc.show.formats import render_show
from tiny import Stack, example

LORA = "apply lora(r=2) to linear\n"
# The order in which blocks run, and which of them are one call of the compiled model.
FOLDED: dict[tuple[int, ...], list[str]] = {
    (0, 1): ["blocks.0", "blocks.1"],
    (1, 0): ["blocks.1", "blocks.0"],
    (0, 1, 0): ["blocks.1"],
    (0, 1, 0, 1): [],
    (0, 0): ["blocks.0"],
    (0, 0, 1): ["blocks.0", "blocks.1"],
}
REPEATED = [order for order in FOLDED if len(set(order)) < len(order)]


def compiled(order: tuple[int, ...], spec: str = LORA, *, fuse: bool = True) -> peftc.CompiledModule:
    torch.manual_seed(0)
    model = Stack(order)
    return peftc.compile(model, spec, example=example(model), fuse=fuse)


def learning(module: peftc.CompiledModule) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {name: item for name, item in module.named_parameters() if item.requires_grad}
    with torch.no_grad():
        for tensor in found.values():
            tensor.normal_(std=0.05)
    return found


def by_definition(module: peftc.CompiledModule, x: Tensor) -> Tensor:
    """The base model with each weight plus the method's change of it."""
    weights = {name: tensor.detach() for name, tensor in module.base.named_parameters()}
    for binding in module.plan.bindings:
        state = {name: module.get_parameter(full) for name, full in binding.names.items()}
        changed, site = binding.site.parameters[0], binding.site
        weights[changed] = weights[changed] + binding.method.delta(site, **state)
    return torch.as_tensor(functional_call(module.base, weights, (x,)))


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("order", FOLDED, ids=str)
def test_values_and_gradients(order: tuple[int, ...], fuse: bool, tmp_path: Path) -> None:
    module = compiled(order, fuse=fuse)
    state, x = learning(module), torch.randn(3, 6, requires_grad=True)
    assert [node.target for node in module.graph.find_nodes(op="call_module")] == FOLDED[order]
    found, expected = module(x), by_definition(module, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    inputs = (*state.values(), x)
    gradients = torch.autograd.grad(found.sin().sum(), inputs)
    for one, other in zip(gradients, torch.autograd.grad(expected.sin().sum(), inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    module.save(tmp_path / "saved")
    again = peftc.load(tmp_path / "saved", module.base)
    assert again.state_dict().keys() == module.state_dict().keys()
    torch.testing.assert_close(again(x), by_definition(module, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.merge()(x), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", REPEATED, ids=str)
@pytest.mark.parametrize("spec", ["apply adapter(size=2) to mlp\n", "apply ladder(size=2) to block\n"])
def test_a_method_of_one_run_is_refused_where_there_are_more(order: tuple[int, ...], spec: str) -> None:
    """It would act in one of them, without a word."""
    with pytest.raises(peftc.PeftcError, match="it runs more than once") as caught:
        compiled(order, spec)
    assert [one.code for one in caught.value.diagnostics] == ["refused"]


def test_an_adapter_fits_a_block_that_runs_once() -> None:
    module = compiled((0, 0, 1), "apply adapter(size=2) to mlp in layers[1:]\n")
    assert [binding.site.name for binding in module.plan.bindings] == ["blocks.1.mlp"]


def test_a_block_that_is_no_call_cannot_be_recomputed() -> None:
    with pytest.raises(peftc.PeftcError, match=r"blocks\.0 cannot be computed again by itself"):
        compiled((0, 1, 0), f"{LORA}checkpoint block\n")


@pytest.mark.parametrize("order", REPEATED, ids=str)
def test_each_call_of_a_block_is_drawn(order: tuple[int, ...]) -> None:
    module = compiled(order, fuse=False)
    lines = render_show(module).splitlines()
    drawn = [word for line in lines for word in line.split() if word.startswith("blocks.")]
    assert drawn == [f"blocks.{index}" for index in order]
    assert render_show(module, format="html").count("</html>") == 1
    assert "up.weight" in render_show(module, block="blocks.0")
