"""A merged model has a number wherever the base model has one, or is not made."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import peftc
from marks import first_is_quick
from peftc.cli import main
from tiny import Gated, example

LORA = 'apply lora(r=2) to "up", "down"'
LARGEST = torch.finfo(torch.float16).max


def made(spec: str, dtype: torch.dtype = torch.float32) -> peftc.CompiledModule:
    torch.manual_seed(0)
    model = Gated().to(dtype)
    return peftc.compile(model, spec, example={"x": example(model)["x"].to(dtype)})


def filled(module: peftc.CompiledModule, number: float, *parts: str) -> peftc.CompiledModule:
    """Every learned tensor whose name has one of `parts` in it holds `number`."""
    with torch.no_grad():
        for name, parameter in module.trainable_parameters().items():
            if any(part in name for part in parts):
                parameter.fill_(number)
    return module


def refused(module: peftc.CompiledModule, **how: Any) -> dict[str, str]:
    """The weights that merging stops at, and why."""
    before = {name: tensor.clone() for name, tensor in module.base.state_dict().items()}
    with pytest.raises(peftc.PeftcError) as raised:
        module.merge(**how)
    assert {problem.code for problem in raised.value.diagnostics} == {"not-finite"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.base.state_dict().items())
    return {problem.title.split()[0]: problem.notes[0] for problem in raised.value.diagnostics}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_was_learned_is_not_finite(number: float) -> None:
    """Every weight is named at once, those that are well are not."""
    module = filled(made(LORA), number, "up.lora.B", "down.lora.A")
    assert refused(module).keys() == {"up.weight", "down.weight"}
    assert refused(filled(made(LORA), number, "down.lora.A")).keys() == {"down.weight"}


@pytest.mark.parametrize(
    ("dtype", "number", "most"), [(torch.float16, 300.0, "float16"), (torch.bfloat16, 1e19, "bfloat16")]
)
def test_the_sum_is_too_large(dtype: torch.dtype, number: float, most: str) -> None:
    found = refused(filled(made(LORA, dtype), number, "up.lora"))
    assert found.keys() == {"up.weight"}
    assert f"too large for {most}:" in found["up.weight"]


@pytest.mark.parametrize(
    ("spec", "parts", "names"),
    [
        ('apply dora(r=2) to "down"', (".m",), {"down.weight"}),
        ('apply ia3(on=input) to "down"', (".l",), {"down.weight"}),
        ('apply ia3(on=output) to "down"', (".l",), {"down.weight", "down.bias"}),
        ('apply lora(r=2) to "up"\ntrain bias', ("bias",), {"down.bias"}),
        ('apply lora(r=2) to "up"\ntrain "down"', ("down",), {"down.weight", "down.bias"}),
        (f"quantize linear with nf4\n{LORA}", ("up.lora",), {"up.weight"}),
        (f"quantize linear with int8\n{LORA}", ("up.lora",), {"up.weight"}),
    ],
)
def test_each_way_into_a_weight(spec: str, parts: tuple[str, ...], names: set[str]) -> None:
    assert refused(filled(made(spec), float("nan"), *parts)).keys() == names


def test_what_the_base_has_not_finite_stays_so() -> None:
    torch.manual_seed(0)
    model = Gated()
    with torch.no_grad():
        model.up.weight[0, 0], model.up.weight[1, 1] = float("inf"), float("nan")
    module = peftc.compile(model, LORA, example=example(model))
    torch.testing.assert_close(module.merge().get_parameter("up.weight"), model.up.weight, equal_nan=True)


def test_unfrozen_by_hand() -> None:
    module = made(LORA)
    module.get_parameter("gate.weight").requires_grad_(True)
    module(x=torch.ones(2, 6))
    assert refused(filled(module, float("inf"), "gate.weight")).keys() == {"gate.weight"}


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_rounding_again_keeps_what_fp16_has_not(storage: str) -> None:
    """What is merged is finite in float32, and larger than all that eight bits by way of float16 can stand for."""
    module = made(f"quantize linear with {storage}\n{LORA}")
    with torch.no_grad():
        module.get_parameter("up.lora.B").fill_(1.0)
        module.get_parameter("up.lora.A").fill_(1e5)
    merged, lost = module.merge(requantize=True)
    assert merged.get_parameter("up.weight").isfinite().all()
    assert lost["up.weight"].relative < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("quantize", first_is_quick(["quantize linear except head with nf4\n", ""]))
def test_a_command_writes_nothing(quantize: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the base's weights are read one at a time."""
    torch.manual_seed(0)
    settings: Any = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**settings, num_attention_heads=4))
    model.half().save_pretrained(tmp_path / "model")
    module = peftc.compile(tmp_path / "model", f"{quantize}apply lora(r=2) to mlp.up")
    filled(copy.deepcopy(module), 300.0, "layers.1.mlp.up_proj").save(tmp_path / "artifact")
    assert main(["merge", str(tmp_path / "artifact"), "-o", str(tmp_path / "merged")]) == 1
    told = capsys.readouterr().err
    assert "model.layers.1.mlp.up_proj.weight cannot be merged" in told
    assert "layers.0" not in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "model"]
