"""One file each: the examples of passes/README.md, in a copy of passes/, are in everything that lists or runs passes.

Nothing else is written: the rest of the checkout is links. Everything runs in processes of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paths import ROOT

EXAMPLE = re.compile(r"^`passes/([\w/]+\.py)`:\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILES = {
    "methods/shift.py", "methods/slope.py", "storage/bf16.py", "fusions/shifted_linear.py", "sites/activation.py",
}  # fmt: skip

SPEC = """\
quantize linear except head with bf16
apply shift(scale=2) to linear
apply slope to activation in layers[-1:] where width > 40
"""
MODEL = '''\
"""A tiny llama, and what the spec makes of its last feed-forward, by hand."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftc


def tiny():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, **sizes))


def by_hand(model, state, x):
    path = "model.layers.1.mlp"
    gate, up, down = (
        torch.nn.functional.linear(x, model.get_parameter(f"{path}.{name}.weight").bfloat16().float())
        + 2 * state[f"{path}.{name}.shift.v"].tanh()
        if name != "down_proj" else None
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    gate = torch.nn.functional.silu(gate)
    stretched = gate + gate * state[f"{path}.act_fn.slope_silu_1.v"]
    weight = model.get_parameter(f"{path}.down_proj.weight").bfloat16().float()
    return stretched * up @ weight.T + 2 * state[f"{path}.down_proj.shift.v"].tanh()


if __name__ == "__main__":
    model, ids = tiny(), torch.arange(3, 15).reshape(2, 6)
    compiled = peftc.compile(model, open("spec.peft").read())
    for parameter in compiled.trainable_parameters().values():
        torch.nn.init.normal_(parameter)
    state = compiled.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and ".1.mlp" not in name:
            if name != "lm_head":
                layer.weight.data = layer.weight.bfloat16().float()
            layer.bias = torch.nn.Parameter(2 * state[f"{name}.shift.v"].tanh())
    model.model.layers[1].mlp.forward = lambda x: by_hand(model, state, x)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
'''


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the files and nothing else that is new."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("peftc", "grammar", "tests", "examples", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "passes", folder / "passes", ignore=shutil.ignore_patterns("__pycache__"))
    examples = dict(EXAMPLE.findall((ROOT / "passes" / "README.md").read_text()))
    assert examples.keys() == FILES
    for name, text in examples.items():
        assert not (folder / "passes" / name).exists()
        (folder / "passes" / name).write_text(text)
    (folder / "spec.peft").write_text(SPEC)
    (folder / "tiny.py").write_text(MODEL)
    return folder


def run(checkout: Path, *arguments: str, status: int = 0) -> str:
    """What Python prints there; of what fails, the complaints, too."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(
        [sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == status, ran.stdout + ran.stderr
    return ran.stdout if status == 0 else ran.stdout + ran.stderr


def peftc(checkout: Path, *arguments: str, status: int = 0) -> str:
    """What the command line prints."""
    return run(checkout, "-m", "peftc", *arguments, status=status)


def test_the_language_has_them(checkout: Path) -> None:
    assert peftc(checkout, "check", "spec.peft") == "spec.peft: no errors\n"
    (checkout / "wrong.peft").write_text("apply shift(scal=2) to activaton\n")
    told = peftc(checkout, "check", "wrong.peft", status=1)
    assert "apply shift(scal=2) to activaton\n  |             ^^^^ did you mean 'scale'?" in told
    assert "did you mean 'activation'?" in told


def test_the_command_line_lists_them(checkout: Path) -> None:
    listed: list[dict[str, Any]] = json.loads(peftc(checkout, "methods", "--json"))
    known = {item["name"]: item for item in listed}
    assert known["shift"]["parameters"]["scale"]["default"] == 1.0
    assert known["shift"]["merges"]
    assert known["slope"]["sites"] == ["activation"]
    assert known["bf16"]["summary"].startswith("Each number rounded to bfloat16")


def test_they_are_compiled_and_the_fusion_fires(checkout: Path) -> None:
    told = json.loads(peftc(checkout, "compile", "--json", "spec.peft", "tiny.py:tiny"))
    assert [item["sites"] for item in told["statements"]] == [14, 15, 1]
    assert {item["storage"] for item in told["stored"]} == {"bf16()"}
    (rule,) = (item for item in told["fusions"] if item["rule"] == "shifted_linear")
    assert rule["fired"] == 15


@pytest.mark.slow
def test_they_compute_what_they_say(checkout: Path) -> None:
    run(checkout, "tiny.py")


@pytest.mark.slow
def test_show_draws_them(checkout: Path) -> None:
    drawn = peftc(checkout, "show", "spec.peft", "tiny.py:tiny", "--block", "model.layers.1")
    assert re.search(r"parameter act_fn\.slope_silu_1\.v .* spec\.peft:3", drawn)
    assert re.search(r"linear gate_proj\.weight .* spec\.peft:2", drawn)
    assert re.search(r"silu .*\n\+.* mul .* spec\.peft:3", drawn)
    told = json.loads(peftc(checkout, "show", "--json", "spec.peft", "tiny.py:tiny", "--block", "model.layers.1"))
    (gate,) = (node for node in told["nodes"] if node["name"] == "gate_proj.weight")
    assert gate["reads"] == ["model.layers.1.mlp.gate_proj.bf16.rounded [48, 32] bf16"]


@pytest.mark.slow
def test_bench_measures_them_and_its_rows_agree(checkout: Path) -> None:
    sizes = ("--repeats", "1", "--batch", "2", "--seq", "8")
    measured = json.loads(peftc(checkout, "bench", "--json", "spec.peft", "tiny.py:tiny", *sizes))
    assert measured["agrees"]
    rows = {row["name"]: row for row in measured["rows"]}
    assert rows["peftc"]["trainable"] == rows["peftc, fuse=False"]["trainable"] > 0


@pytest.mark.slow
def test_they_conform(checkout: Path) -> None:
    """With the conformance tests, and with the rules of the house, as they are."""
    suites = ("tests/methods/test_conformance.py", "tests/test_house.py", "tests/test_layers.py")
    chosen = ("-k", "shift or slope or bf16 or activation", "-m", "not slow")
    told = run(checkout, "-m", "pytest", *suites, *chosen, "-vv", "--rootdir", str(checkout), "-p", "no:cacheprovider")
    for name in FILES:
        assert re.search(rf"test_layers\.py::\w+\[{Path(name).stem}\] PASSED", told)
    for method in ("shift", "slope"):
        assert re.search(rf"test_5_it_comes_back_from_disk\[\w+-{method}\] PASSED", told)
