"""Every spec and script of `examples/`, as a user runs it."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import peftc
from peftc.capture import Captured, capture
from peftc.inputs import example_inputs
from peftc.planning import make_plan
from peftc.roles import find_sites
from peftc.site import Sites
from peftc.syntax import parse, parse_file, unparse
from peftc.text import Source
from zoo import ZOO, inputs

EXAMPLES = Path(__file__).parent.parent / "examples"
SPECS = sorted(EXAMPLES.glob("*.peft"))
RECIPES = {
    "lora", "lora_qv", "rslora", "pissa", "olora", "lora_plus", "dora", "ia3", "houlsby", "pfeiffer",
    "parallel_adapter", "bitfit", "norm", "top_layers", "mixed",
}  # fmt: skip
WITHOUT_BIASES = ("llama", "t5")
MODELS = ("llama", "gpt2", "bert", "t5", "vit")

each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.stem)
each_model = pytest.mark.parametrize(
    "model",
    [
        pytest.param(name, marks=[pytest.mark.xdist_group(name), *([] if name == "llama" else [pytest.mark.slow])])
        for name in MODELS
    ],
)


@cache
def captured(name: str) -> tuple[Captured, Sites]:
    """One capture serves every plan; only a compile would use it up."""
    model = ZOO[name]()
    found = capture(model, example_inputs(model))
    return found, find_sites(found)


def test_every_recipe_is_there() -> None:
    assert {spec.stem for spec in SPECS} >= RECIPES


@each_spec
def test_spec_is_valid_and_reads_back(spec: Path) -> None:
    assert peftc.check(spec) == []
    parsed = parse_file(spec)
    assert parse(Source("<spec>", unparse(parsed))) == parsed


@each_spec
def test_spec_says_what_it_is(spec: Path) -> None:
    lines = spec.read_text(encoding="utf-8").splitlines()
    header = lines[: lines.index("")]
    assert all(line.startswith("#") and len(line) <= 120 for line in header)
    assert "arXiv:" in " ".join(header)
    assert "Expect" in " ".join(header)


@each_model
@each_spec
def test_spec_fits_every_architecture(spec: Path, model: str) -> None:
    found, sites = captured(model)
    if spec.stem == "bitfit" and model in WITHOUT_BIASES:
        with pytest.raises(peftc.PeftcError, match="bias"):
            make_plan(found, sites, parse_file(spec))
        return
    plan = make_plan(found, sites, parse_file(spec))
    assert 0 < plan.trainable < plan.total


@pytest.mark.slow
@each_spec
def test_spec_compiles_and_learns(spec: Path) -> None:
    torch.manual_seed(0)
    base = ZOO["gpt2" if spec.stem == "bitfit" else "llama"]()
    batch = inputs(base)
    model = peftc.compile(base, spec)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, base.eval()(**batch).logits, rtol=1e-5, atol=1e-5)
    optimiser = torch.optim.AdamW(model.param_groups(1e-3))
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_train_script_trains_saves_and_resumes(tmp_path: Path) -> None:
    def train(*arguments: str) -> list[str]:
        command = [sys.executable, "-W", "error", str(EXAMPLES / "train.py"), "--batch", "1", *arguments]
        paths = [str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(
            [*command, "--output", str(tmp_path)], env=environment, capture_output=True, text=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        assert "[transformers]" not in done.stderr  # what transformers warns of
        return done.stdout.splitlines()

    first = train("--steps", "2")
    assert any(line.startswith("before:") for line in first)
    assert any(line.startswith("after:") for line in first)
    assert any(line.startswith("loss:") for line in first)
    with safe_open(tmp_path / "checkpoint-2" / "model.safetensors", "pt") as tensors:
        assert len(list(tensors.keys())) == 2 * 210
    assert (tmp_path / "artifact" / "peftc.json").is_file()
    train("--steps", "3", "--resume")
    assert (tmp_path / "checkpoint-3").is_dir()
