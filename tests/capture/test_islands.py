"""Modules that cannot be traced run their own code, as one operation; here those that nobody would write so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftc
from peftc.bench.counting.count import count

EVERY = "apply lora(r=2, alpha=4) to linear"


class Routed(nn.Module):
    """Each token goes to one of two layers, by a branch on numbers."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.router, self.norm = nn.Linear(width, 2), nn.LayerNorm(width)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.norm(x).flatten(0, -2)
        chosen = self.router(flat).argmax(-1)
        y = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            tokens = (chosen == number).nonzero()[:, 0]
            if len(tokens):
                y = y.index_add(0, tokens, self.drop(expert(flat[tokens])))
        return y.view_as(x)


class Recurrent(nn.Module):
    """A loop over time that ends where a number says; the weights are read, and the layers not called."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.into, self.back = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.cell = nn.LSTM(width, width, batch_first=True)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, None, Tensor]:
        state, states = torch.zeros_like(x[:, 0]), []
        for step in range(x.shape[1]):
            state = torch.tanh(F.linear(x[:, step], self.into.weight, self.into.bias) + state @ self.back.weight.T)
            if state.abs().sum() > 1e-9:
                states.append(state * scale)
        return self.cell(torch.stack(states, 1))[0], None, x


class Model(nn.Module):
    """Blocks with something that cannot be traced in each, and a head."""

    def __init__(self, make: Callable[[], nn.Module], depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(6, 6), make()]) for _ in range(depth))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for pair in self.blocks:
            first, second = cast(nn.ModuleList, pair)
            found = second(F.silu(first(x)))
            x = x + (found[0] if isinstance(found, tuple) else found)
        result: Tensor = self.head(x)
        return result


def compiled_of(model: nn.Module, spec: str = EVERY, **options: Any) -> peftc.CompiledModule:
    return peftc.compile(model, spec, example=torch.randn(2, 5, 6), **options)


def shaken(compiled: peftc.CompiledModule) -> peftc.CompiledModule:
    with torch.no_grad():
        for parameter in compiled.trainable_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return compiled


def dense(compiled: peftc.CompiledModule, model: nn.Module) -> nn.Module:
    """The model with every change written into its weights by hand: the oracle."""
    own = copy.deepcopy(model)
    with torch.no_grad():
        for binding in compiled.plan.bindings:
            a, b = (compiled.get_parameter(binding.names[name]) for name in "AB")
            own.get_parameter(f"{binding.site.name}.weight").add_(2 * b @ a)
    return own


def agrees(compiled: peftc.CompiledModule, model: nn.Module, x: Tensor) -> None:
    """Outputs, and the gradients of factors, by those of the whole weights."""
    reference = dense(compiled, model)
    expected = reference(x)
    found = compiled(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for binding in compiled.plan.bindings:
        a, b = (compiled.get_parameter(binding.names[name]) for name in "AB")
        whole = reference.get_parameter(f"{binding.site.name}.weight").grad
        if whole is None:  # a router's, whose choice has no gradient
            assert a.grad is b.grad is None, binding.site.name
            continue
        torch.testing.assert_close(a.grad, 2 * b.T @ whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b.grad, 2 * whole @ a.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("make", [Routed, Recurrent])
def test_a_module_that_cannot_be_traced_trains(make: Callable[[], nn.Module], fuse: bool) -> None:
    torch.manual_seed(0)
    model = Model(make).eval()
    compiled = compiled_of(model, fuse=fuse)
    assert [island.path for island in compiled.plan.captured.islands] == ["blocks.0.1", "blocks.1.1"]
    compiled.eval()
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    agrees(shaken(compiled), model, x)
    compiled.zero_grad()
    agrees(compiled, model, torch.randn(4, 5, 6))  # another batch
    compiled.zero_grad()
    agrees(compiled, model, torch.randn(3, 7, 6))  # another length: a graph of its own
    names = {binding.site.name for binding in compiled.plan.bindings}
    assert {"blocks.0.0", "head", *(f"blocks.1.1.{name}" for name in inside(make))} <= names


def inside(make: Callable[[], nn.Module]) -> list[str]:
    return [name for name, module in make().named_modules() if isinstance(module, nn.Linear)]


def test_dropout_in_an_island_follows_eval() -> None:
    model = Model(Routed)
    compiled, x = compiled_of(model), torch.randn(2, 5, 6)
    assert not torch.equal(compiled.train()(x), compiled(x))
    assert torch.equal(compiled.eval()(x), compiled(x))
    torch.testing.assert_close(compiled(x), model.eval()(x), rtol=0, atol=0)
    model.train(), compiled.train()
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)


def test_a_statement_in_an_island_is_saved_copied_and_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Model(Recurrent).eval(), torch.randn(2, 5, 6)
    spec = f'{EVERY}\ntrain "**.cell.*"'
    compiled = shaken(compiled_of(model, spec)).eval()
    expected = compiled(x)
    assert torch.equal(copy.deepcopy(compiled)(x), expected)
    compiled.save(tmp_path / "saved")
    assert torch.equal(peftc.load(tmp_path / "saved", model).eval()(x), expected)
    merged = compiled.merge().eval()
    assert type(merged) is Model
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model(x), expected)


METHODS = ("dora(r=2)", "loha(r=2)", "lokr(r=2)", "vera(r=4)", "ia3", "ia3(on=input)", "krona(a=2)",
           "relora(r=2)", "said(dim=4)", "lora(r=2, init=pissa)", "adalora(r=4, target=2)",
           "far(keep=0.5)")  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_changes_a_weight_reaches_an_island(method: str) -> None:
    """Merging is what says what each means there: both come from its definition."""
    torch.manual_seed(0)
    model, x = Model(Routed, 1).eval(), torch.randn(2, 5, 6)
    compiled = compiled_of(model, f'apply {method} to "blocks.*.1.experts.*"').eval()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    shaken(compiled)(x).sum().backward()
    assert all(parameter.grad is not None for parameter in compiled.trainable_parameters().values())
    torch.testing.assert_close(compiled.merge().eval()(x), compiled(x), rtol=1e-4, atol=1e-5)


REFUSED = {
    "apply lora(dropout=0.1) to linear": "without dropout",
    "apply gated(lora) to linear": "only changes of its weight",
    "apply mixture(lora) to linear": "only changes of its weight",
    'apply ia3(mode=add) to "**.back"': "it has no bias",
    "apply lora(init=eva) to linear": "what enters it is not seen",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_what_acts_on_values_is_refused_there(spec: str) -> None:
    with pytest.raises(peftc.PeftcError, match=REFUSED[spec]) as caught:
        compiled_of(Model(Recurrent, 1), spec, calibration=[torch.randn(2, 5, 6)] if "eva" in spec else None)
    assert "blocks.0.1, which runs its own code" in str(caught.value)


def test_existing_parameters_and_packed_weights_there() -> None:
    torch.manual_seed(0)
    model, x = Model(Routed, 1).eval(), torch.randn(2, 5, 6)
    compiled = compiled_of(model, "train norm, bias")
    assert set(compiled.trainable_parameters()) == {
        name for name, _ in model.named_parameters() if "norm" in name or name.endswith("bias")
    }
    compiled.eval()(x).sum().backward()
    model(x).sum().backward()
    for name, parameter in compiled.trainable_parameters().items():
        torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad)
    packed = compiled_of(model, f'quantize "**.experts.*" with int8\n{EVERY}').eval()
    assert set(packed.plan.packed) == {f"blocks.0.1.experts.{number}.weight" for number in range(2)}
    assert 0 < (packed(x) - model(x)).abs().max() < 0.05


def test_the_report_says_which_and_why() -> None:
    compiled = compiled_of(Model(Routed, 3))
    assert "blocks.0.1 and 2 more run their own code" in compiled.report()
    assert "if len(tokens):" in compiled.report()
    (first, *others) = compiled.plan.to_json()["islands"]
    assert (first["module"], len(others)) == ("blocks.0.1", 2)
    assert "data-dependent" in first["reason"]
    assert "islands" not in compiled_of(nn.Sequential(nn.Linear(6, 6))).plan.to_json()


def test_a_checkpoint_of_a_block_with_an_island() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), Routed()

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.as_tensor(self.second(F.silu(self.first(x))))

    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block(), Block()), torch.randn(2, 5, 6)
    plain, again = compiled_of(model), compiled_of(model, f"{EVERY}\ncheckpoint block")
    again.load_state_dict(plain.state_dict())
    for compiled in (plain, again):
        torch.manual_seed(5)
        compiled.train()(x).square().sum().backward()
    for name, parameter in plain.trainable_parameters().items():
        torch.testing.assert_close(again.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-6)


def remembers(self: Hostile, x: Tensor) -> Tensor:
    before = vars(self).get("last", 0.0)
    self.last = x.detach().mean()
    return cast(Tensor, self.layer(x) + before)


def counts(self: Hostile, x: Tensor) -> Tensor:
    self.calls.add_(1)
    return cast(Tensor, self.layer(x))


def writes(self: Hostile, x: Tensor) -> Tensor:
    x.mul_(2)
    return cast(Tensor, self.layer(x))


def a_view(self: Hostile, x: Tensor) -> Tensor:
    return x[..., :]


def as_many_as_are_positive(self: Hostile, x: Tensor) -> Tensor:
    return cast(Tensor, self.layer(x)[self.layer(x)[:, 0, 0] > 0])


class Hostile(nn.Module):
    """Goes by a number, and does something else that no single operation may do."""

    def __init__(self, act: Callable[[Hostile, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(6, 6), act
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self, x) if x.sum() > -1e9 else x


@pytest.mark.parametrize("act", [remembers, counts, writes, a_view, as_many_as_are_positive])
def test_what_no_operation_may_do_is_refused(act: Callable[[Hostile, Tensor], Tensor]) -> None:
    """And said as it was before there were islands."""
    model = Model(lambda: Hostile(act), 1)
    with pytest.raises(peftc.PeftcError) as caught:
        compiled_of(model)
    (problem,) = caught.value.diagnostics
    assert problem.code == "cannot-capture"
    assert "x.sum() > -1e9" in str(problem)


def test_no_step_of_it_is_counted() -> None:
    with pytest.raises(peftc.PeftcError, match=r"blocks\.0\.1 runs its own code"):
        count(Model(Recurrent, 1), EVERY, example=torch.randn(2, 5, 6))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # where torch goes on behind a module
def test_the_compiled_code_of_torch_leaves_it_as_it_is() -> None:
    torch.manual_seed(0)
    model, x = Model(Routed, 1).eval(), torch.randn(2, 5, 6)
    compiled = shaken(compiled_of(model)).eval()
    expected = compiled(x)
    torch.testing.assert_close(torch.compile(compiled, backend="aot_eager")(x), expected, rtol=1e-6, atol=1e-6)


def test_the_model_keeps_its_own_and_the_caller_its_random_numbers() -> None:
    torch.manual_seed(0)
    model = Model(Routed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    peftc.plan(model, EVERY, example=torch.zeros(2, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())
