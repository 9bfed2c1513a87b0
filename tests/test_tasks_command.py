"""The commands on a spec with tasks: `compile`, `show --task`, `merge --task`, `bench --generate` by row."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peftc

SPEC = """
task french { apply lora(r=4) to attn.q }
task german { apply lora(r=4) to attn.q }
task terse { apply ia3 to mlp.down }
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spec") / "tasks.peft"
    path.write_text(SPEC)
    return path


def test_they_are_compiled_and_told(run: Run, model: Path, spec: Path, tmp_path: Path) -> None:
    status, out, err = run("compile", spec, model, "-o", tmp_path / "artifact")
    assert (status, err) == (0, "")
    assert all(f"task {name}" in out for name in ("french", "german", "terse"))
    assert peftc.load(tmp_path / "artifact").tasks == ("french", "german", "terse")
    status, out, _ = run("plan", spec, model, "--json")
    found = json.loads(out)
    assert [row["task"] for row in found["statements"]] == ["french", "german", "terse"]
    assert found["trainable"] == sum(task["trainable"] for task in found["tasks"].values())


def test_one_is_shown(run: Run, model: Path, spec: Path) -> None:
    for options, inside in (((), "lora"), (("--task", "terse"), "ia3")):
        status, out, err = run("show", spec, model, *options)
        assert (status, err) == (0, "")
        assert inside in out
    status, _, err = run("show", spec, model, "--task", "spanish")
    assert status == 1
    assert "unknown-task" in err


def test_one_is_merged(run: Run, model: Path, tmp_path: Path) -> None:
    several = peftc.compile(model, SPEC)
    with torch.no_grad():
        for parameter in several.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    several.save(tmp_path / "artifact")
    status, _, err = run("merge", tmp_path / "artifact", "-o", tmp_path / "merged")
    assert status == 1
    assert "which-task" in err
    ids = torch.randint(3, 99, (2, 6))
    for task in ("german", "terse"):
        status, _, err = run("merge", tmp_path / "artifact", "-o", tmp_path / task, "--task", task)
        assert (status, err) == (0, "")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / task).eval()
        wanted = several.use(task).eval()(input_ids=ids).logits
        torch.testing.assert_close(merged(ids).logits, wanted, atol=1e-5, rtol=0)


def test_text_by_row_is_measured(run: Run, model: Path, tmp_path: Path) -> None:
    spec = tmp_path / "alike.peft"
    spec.write_text("task a { apply lora(r=4) to attn.q }\ntask b { apply lora(r=2) to mlp.* }\n")
    status, out, err = run("bench", spec, model, "--generate", 2, "--repeats", 1, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert [row["name"] for row in found["rows"]] == ["base", "peftc, one task", "peftc", "HF PEFT"]
    assert found["batch"] == 4
    assert found["agrees"]
