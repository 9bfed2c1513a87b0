"""Every recipe and script of `examples/`, as a user runs it."""

import copy
import os
import re
import subprocess
import sys
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

import peftc
from paths import EXAMPLES
from peftc.diagnostics.source import Source
from peftc.language import parse, parse_file, unparse
from peftc.spec.check import as_spec
from peftc.spec.resolve import resolve
from zoo import ZOO, inputs

torch.set_num_threads(1)

RECIPES = sorted((EXAMPLES / "recipes").glob("*.peft"))
NAMES = {
    "lora", "lora_qv", "rslora", "pissa", "olora", "lora_plus", "dora", "ia3", "houlsby", "pfeiffer",
    "parallel_adapter", "bitfit", "norm", "top_layers", "mixed", "ladder",
}  # fmt: skip
FAMILIES = ("llama", "gpt2", "bert", "t5", "vit")
QUICK = {"lora", "qlora", "mam"}  # one of each kind of rewrite, on their first model

each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)


def header(recipe: Path) -> list[str]:
    """The comment at the top: what it is, by whom, what to expect."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    return list(takewhile(lambda line: line.startswith("#"), lines))


def said(recipe: Path, key: str) -> list[str]:
    """The words of the header's line `# key: words`; none where there is no such line."""
    start = f"# {key}:"
    return [word for line in header(recipe) if line.startswith(start) for word in line.removeprefix(start).split()]


def families(recipe: Path) -> tuple[str, ...]:
    """The models of `zoo.py` that a recipe is for: those of its line `# families:`, and else all five."""
    return tuple(said(recipe, "families")) or FAMILIES


def on_its_families() -> list[Any]:
    """Every recipe with each model it is for: a few in the quick run, the others marked slow."""
    return [
        pytest.param(
            recipe, family, id=f"{recipe.stem}-{family}",
            marks=[
                pytest.mark.xdist_group(f"examples-{family}"),
                *([] if recipe.stem in QUICK and not place else [pytest.mark.slow]),
            ],
        )
        for recipe in RECIPES
        for place, family in enumerate(families(recipe))
    ]  # fmt: skip


@cache
def base_model(family: str, layers: int = 2) -> PreTrainedModel:
    """One model for all the recipes, which share its capture; compiling leaves it as it is."""
    model: PreTrainedModel = ZOO[family]()
    if layers != 2:
        config = copy.deepcopy(model.config)
        config.num_hidden_layers = layers
        torch.manual_seed(0)
        model = type(model)(config)
    model.eval()
    return model


def base_for(recipe: Path, family: str) -> PreTrainedModel:
    """With two layers, or as many as the recipe's line `# layers:` says that it needs."""
    return base_model(family, *map(int, said(recipe, "layers")))


def test_every_recipe_is_there() -> None:
    assert {recipe.stem for recipe in RECIPES} >= NAMES


@each_recipe
def test_recipe_is_valid_and_reads_back(recipe: Path) -> None:
    assert peftc.check(recipe) == []
    parsed = parse_file(recipe)
    assert parse(Source("<spec>", unparse(parsed))) == parsed


@each_recipe
def test_recipe_says_what_it_is(recipe: Path) -> None:
    """What it does, the paper (authors, year, arXiv number), what to expect, and models that there are."""
    lines = header(recipe)
    assert all(len(line) <= 120 for line in lines)
    text = " ".join(line.removeprefix("#").strip() for line in lines)
    assert re.search(r"\w+( et al\.| & \w+)? 20\d\d( \(\w+\))?, arXiv:\d{4}\.\d{4,5}", text)
    assert "Expect" in text
    assert set(families(recipe)) <= set(ZOO)


@pytest.mark.parametrize(("recipe", "family"), on_its_families())
def test_recipe_compiles_and_learns(recipe: Path, family: str) -> None:
    """It starts as the model where its methods claim to, and ten steps on one batch bring the loss down."""
    torch.manual_seed(0)
    base = base_for(recipe, family)
    batch = inputs(base)
    asks = any(application.method.data for application in resolve(as_spec(recipe)).applications)
    model = peftc.compile(base, recipe, calibration=[batch] if asks else None).eval()
    assert 0 < model.plan.trainable < model.plan.total
    with torch.no_grad():
        before = model(**batch)
        if all(binding.method.identity for binding in model.plan.bindings) and not model.plan.packed:
            torch.testing.assert_close(before.logits, base(**batch).logits, rtol=1e-5, atol=1e-5)
    # What learns five numbers on a random classifier has a long way to go at a rate that suits thousands.
    assert any(loss_after_ten_steps(model, batch, rate) < before.loss for rate in (1e-3, 3e-2, 0.3))


def loss_after_ten_steps(model: peftc.CompiledModule, batch: dict[str, torch.Tensor], rate: float) -> torch.Tensor:
    """From the model's start, to which it returns."""
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.param_groups(rate))
    follower = model.follow(optimizer)
    model.train()
    for _ in range(10):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    follower.remove()
    with torch.no_grad():
        loss: torch.Tensor = model.eval()(**batch).loss
    model.load_state_dict(start)
    return loss


@pytest.mark.slow
@each_recipe
def test_torch_compile_takes_it_as_one_graph(recipe: Path) -> None:
    """A training step without a graph break, and the same loss where nothing is random."""
    torch.manual_seed(0)
    base = base_for(recipe, families(recipe)[0])
    batch = inputs(base)
    asks = any(application.method.data for application in resolve(as_spec(recipe)).applications)
    model = peftc.compile(base, recipe, calibration=[batch] if asks else None)
    torch.compiler.reset()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.train()
    fast(**batch).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(fast(**batch).loss, model(**batch).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_no_biases_to_train_is_an_error(family: str) -> None:
    with pytest.raises(peftc.PeftcError, match="bias"):
        peftc.plan(base_model(family), EXAMPLES / "recipes" / "bitfit.peft")


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
