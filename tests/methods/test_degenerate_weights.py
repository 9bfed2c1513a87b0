"""Rows of zeros, rows next to zero, columns and whole weights of zeros, and weights that half precision just holds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import peftc
from peftc.protocol.method import Stage
from subjects import Subject, subject
from tiny import Layer
from variants import VARIANTS, built, home, statement

SIZES = (0.0, 1e-42, 1e-36, 1e-30, 1e-18, 1e-10)  # what some rows are multiplied by
QUANTISED = ("", *(f"quantize linear with {one}\n" for one in ("nf4(double=true)", "fp4", "int8")))
ADAPTED = [variant for variant in VARIANTS if built(variant).stage in (Stage.WEIGHT, Stage.OUTPUT)]


def thinned(base: nn.Module) -> nn.Module:
    """A copy: in the first block some rows and a column are all but nothing, in the second whole weights are zero."""
    model = copy.deepcopy(base).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() != 2:
                continue
            if "layers.0" in name:
                parameter[:, 2] = 0
                for row, size in enumerate(SIZES):
                    parameter[row] *= size
            elif "query" in name or "narrow" in name or "q_proj" in name or "down_proj" in name:
                parameter.zero_()
    return model


def made(spec: str, variant: str = "", fuse: bool = True) -> tuple[peftc.CompiledModule, Subject]:
    name = home(variant) if variant else "plain"
    batch = {key: t.float() if t.is_floating_point() else t for key, t in subject(name).batch.items()}
    model = thinned(subject(name).base)
    torch.manual_seed(1)
    data = [batch] if variant and built(variant).data else None
    example = batch if name == "plain" else None
    module = peftc.compile(model, spec, example=example, calibration=data, fuse=fuse)
    return module.eval(), Subject(name, model, batch, example, {})


def rounded(module: peftc.CompiledModule) -> nn.Module:
    model = copy.deepcopy(module.base)
    with torch.no_grad():
        for name, item in module.plan.packed.items():
            model.get_parameter(name).copy_(item.unpack(item.pack(model.get_parameter(name))))
    return model


def learns(module: peftc.CompiledModule, case: Subject, steps: int = 3) -> dict[str, Tensor]:
    """Some steps, of which every gradient is of the size that it is elsewhere; the first ones."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    first: dict[str, Tensor] = {}
    for _ in range(steps):
        case.loss(module).backward()
        gradients = {name: p.grad.clone() for name, p in module.trainable_parameters().items() if p.grad is not None}
        first = first or gradients
        assert all(gradient.abs().max() < 1e3 for gradient in gradients.values()), {
            name: float(gradient.abs().max()) for name, gradient in gradients.items()
        }
        optimizer.step()
        optimizer.zero_grad()
    return first


@pytest.mark.parametrize("quantised", QUANTISED)
@pytest.mark.xdist_group("conformance-plain")
def test_dora_starts_as_the_base_and_learns(quantised: str) -> None:
    spec = f"{quantised}apply dora(r=3) to attn.q, mlp.down"
    module, case = made(spec)
    expected = case.outputs(rounded(module))
    torch.testing.assert_close(case.outputs(module), expected, rtol=1e-5, atol=1e-5)
    plain, _ = made(spec, fuse=False)
    torch.testing.assert_close(learns(module, case), learns(plain, case), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(case.outputs(module.merge()), case.outputs(module), rtol=1e-4, atol=1e-4)


@pytest.mark.xdist_group("conformance-plain")
def test_a_row_of_zeros_learns() -> None:
    """Its first gradient is that of B alone; then its length grows."""
    module, case = made("apply dora(r=3) to attn.q, mlp.down")
    learns(module, case, steps=6)
    for name, parameter in module.trainable_parameters().items():
        if name.endswith(".m"):
            assert (parameter.detach().abs() > 1e-8).all(), name  # from 1e-19


def obstacles(module: peftc.CompiledModule) -> list[str]:
    """Why it does not merge."""
    bare = [b for b in module.plan.bindings if b.method.adds_bias(b.site) and getattr(b.site, "bias", None) is None]
    return [b.site.name for b in bare] + [b.method.name for b in module.plan.bindings if b.method.unmergeable]


@pytest.mark.slow
@pytest.mark.parametrize("variant", [variant for variant in ADAPTED if built(variant).identity])
def test_every_method_starts_as_the_base_and_learns(variant: str) -> None:
    module, case = made(statement(variant), variant)
    torch.testing.assert_close(case.outputs(module), case.outputs(case.base), rtol=1e-4, atol=1e-4)
    learns(module, case)
    if not obstacles(module):
        assert all(tensor.isfinite().all() for tensor in module.merge().state_dict().values())


@pytest.mark.parametrize("method", ["dora(r=6)", "lora(r=3, init=pissa)", "lora(r=3, alpha=4, init=olora)", "ia3"])
def test_numbers_that_half_precision_just_holds(method: str) -> None:
    """What a method takes out of the weight, or holds against it, may be larger than any float16."""
    torch.manual_seed(0)
    model = Layer().half()
    with torch.no_grad():
        model.proj.weight.copy_(torch.full((4, 6), 6e4) * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None])
    x = torch.full((2, 6), 1e-2, dtype=torch.float16)
    module = peftc.compile(model, f"apply {method} to linear", example=x)
    with torch.no_grad():
        if "dora" in method:  # a draw of A whose product with a row passes 65504
            module.get_parameter("proj.dora.A").fill_(1.0)
    torch.testing.assert_close(module(x), model(x), rtol=4e-3, atol=1.0)
    torch.testing.assert_close(module.merge()(x), model(x), rtol=4e-3, atol=1.0)


def refused(model: nn.Module, spec: str, x: Tensor) -> str:
    with pytest.raises(peftc.PeftcError) as raised:
        peftc.compile(model, spec, example=x)
    (problem,) = raised.value.diagnostics
    assert problem.code == "leaves-no-numbers"
    return problem.title


@pytest.mark.parametrize("quantised", ["", "quantize linear with int8\n"])
def test_what_is_left_of_a_weight_that_half_precision_has_not(quantised: str) -> None:
    """OLoRA takes alpha/r times a part of the weight out of it."""
    model = Layer().half()
    nn.init.constant_(model.proj.weight, 6e4)
    spec = f"{quantised}apply lora(r=3, alpha=16, init=olora) to linear"
    assert "proj.weight" in refused(model, spec, torch.ones(2, 6).half())


def test_scales_that_are_rounded_beyond_half_precision() -> None:
    layer = nn.Linear(64, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([6e4, 6e4, 3e4, 10, 6e4, 6e4, 6e4, 6e4])[:, None].expand(8, 64))
        layer.weight[0, 0] = 65504
    model = nn.Sequential(layer).half()
    spec = "quantize linear with nf4(double={})\ntrain bias"
    x = torch.full((2, 64), 1e-3, dtype=torch.float16)
    assert "0.weight" in refused(model, spec.format("true"), x)
    assert peftc.compile(model, spec.format("false"), example=x)(x).isfinite().all()
