"""The command line: exit status, tables, `--json`, errors without a traceback."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peftc
from paths import ROOT
from peftc.capture.checkpoints.references import load_model, parse_reference
from peftc.cli import COMMANDS, main
from peftc.language.parse import read_file
from peftc.spec.resolve import resolve

SPEC = "apply lora(r=4, alpha=8) to attn.q, attn.v\ntrain norm\n"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """(status, stdout, stderr) of one command."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama as a Hugging Face folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "lora.peft"
    path.write_text(SPEC)
    return path


def test_compile_reports_saves_and_merges(run: Run, model: Path, spec: Path, tmp_path: Path) -> None:
    status, out, err = run("compile", spec, model, "-o", tmp_path / "build" / "lora", "--timings")
    assert (status, err) == (0, "")
    assert "apply lora(r=4, alpha=8) to attn.q, attn.v" in out
    assert "compile / torch.export" in out
    artifact = tmp_path / "build" / "lora"
    assert sorted(path.name for path in artifact.iterdir()) == ["adapter.safetensors", "peftc.json"]

    status, out, err = run("merge", artifact, "-o", tmp_path / "merged")
    assert (status, err) == (0, "")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.randint(3, 90, (2, 6))
    compiled = peftc.load(artifact)
    compiled.eval()
    torch.testing.assert_close(merged(ids).logits, compiled(ids).logits, rtol=0, atol=1e-5)

    status, _, err = run("merge", artifact, "-o", tmp_path / "merged")
    assert status == 1
    assert "bad-output" in err

    odd = tmp_path / os.fsdecode(b"caf\xe9\n")  # no UTF-8, and a line break
    status, out, err = run("merge", artifact, "-o", odd)
    assert (status, err) == (0, "")
    assert out.endswith("caf\ufffd\u240a\n")
    assert (odd / "config.json").exists()


@pytest.mark.slow
def test_plan_needs_no_weights(run: Run, model: Path, spec: Path) -> None:
    status, out, err = run("plan", spec, model / "config.json", "--json", "--batch", 2, "--seq", 64)
    assert (status, err) == (0, "")
    plan = json.loads(out)
    assert plan["trainable"] == 4 * (32 + 32) * 2 + 4 * (32 + 16) * 2 + 5 * 32
    assert plan["memory"]["optimizer"] == 8 * plan["trainable"]
    assert [row["sites"] for row in plan["statements"]] == [4, 5]

    status, out, _ = run("plan", spec, model)
    assert status == 0
    assert "optimizer" in out


def test_a_bare_config_compiles_only_with_random_weights(run: Run, model: Path, spec: Path) -> None:
    status, _, err = run("compile", spec, model / "config.json")
    assert status == 1
    assert "no-weights" in err
    status, out, _ = run("compile", spec, model / "config.json", "--random-weights", "--json")
    assert status == 0
    assert json.loads(out)["model"] == "LlamaForCausalLM"


def test_check_says_everything_at_once(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "bad.peft"
    path.write_text("apply lora(rnak=8) to attn.q\napply lroa to attn.v\ntrain nrom\n")
    status, out, err = run("check", path)
    assert (status, out) == (1, "")
    assert "did you mean 'rank'?" in err
    assert "did you mean 'lora'?" in err
    assert "did you mean 'norm'?" in err
    assert "3 errors" in err
    status, out, _ = run("check", path, "--json")
    assert status == 1
    assert [error["line"] for error in json.loads(out)["errors"]] == [1, 2, 3]


def test_check_is_silent_about_a_good_spec(run: Run, spec: Path) -> None:
    status, out, _ = run("check", spec)
    assert status == 0
    assert "no errors" in out


@pytest.mark.slow
def test_what_is_quantised_is_counted_merged_and_rounded_again(run: Run, model: Path, tmp_path: Path) -> None:
    spec = tmp_path / "qlora.peft"
    spec.write_text(f"quantize linear except head with nf4(double=true)\n{SPEC}")
    status, out, err = run("compile", spec, model, "-o", tmp_path / "qlora")
    assert (status, err) == (0, "")
    assert "kB │ of " in out
    status, out, err = run("merge", tmp_path / "qlora", "-o", tmp_path / "dense")
    assert (status, err) == (0, "")
    assert "error / weight" not in out
    status, out, err = run("merge", tmp_path / "qlora", "-o", tmp_path / "rounded", "--requantize")
    assert (status, err) == (0, "")
    assert "error / weight" in out
    assert "4 more, at most" in out
    status, said, _ = run("merge", tmp_path / "qlora", "-o", tmp_path / "again", "--requantize", "--json")
    told = json.loads(said)
    assert told["packed"]
    assert len(told["lost"]) == 14
    assert max(told["lost"], key=lambda name: float(told["lost"][name]["relative"])) in out
    dense, rounded = (
        load_model(parse_reference(str(tmp_path / name)))[0].state_dict() for name in ("dense", "rounded")
    )
    for name, rounding in told["lost"].items():
        assert rounding["largest"] == float((dense[name] - rounded[name]).abs().max())


@pytest.mark.slow
def test_a_packed_model_is_a_base_like_any_other(run: Run, model: Path, tmp_path: Path) -> None:
    spec, first, second = (tmp_path / name for name in ("qlora.peft", "first", "second"))
    spec.write_text(f"quantize linear except head with nf4(double=true)\n{SPEC}")
    base = model
    for folder in (first, second):
        for arguments in (("plan", spec, base), ("compile", spec, base, "-o", folder / "adapter")):
            status, out, err = run(*arguments)
            assert (status, err) == (0, "")
        status, out, err = run("merge", folder / "adapter", "-o", folder / "merged", "--requantize")
        assert (status, err) == (0, "")
        assert "packed for bitsandbytes" in out
        base = folder / "merged"
    status, _, err = run(
        "merge", second / "adapter", "-o", tmp_path / "told", "--requantize", "--model", first / "merged"
    )
    assert (status, err) == (0, "")
    weights = [load_file(folder / "model.safetensors") for folder in (second / "merged", tmp_path / "told")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
    status, out, err = run("bench", spec, base, "--repeats", 1, "--batch", 2, "--seq", 8)
    assert (status, err) == (0, "")


def test_storages_are_listed(run: Run) -> None:
    status, out, _ = run("methods")
    assert status == 0
    assert "quantize SELECTOR with" in out
    status, out, _ = run("methods", "nf4")
    assert status == 0
    assert "whether the scales are quantised" in out
    status, out, _ = run("methods", "int8", "--json")
    assert [item["name"] for item in json.loads(out)] == ["int8"]


def test_sites_and_methods(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # on narrower ones the table of methods has no papers
    status, out, _ = run("sites", model)
    assert status == 0
    assert "attn.q" in out
    assert "layers.1" not in out, "one of equal layers is enough"
    _, everything, _ = run("sites", model, "--all")
    assert "layers.1" in everything
    _, out, _ = run("sites", model, "--json")
    told = json.loads(out)
    assert {"attn.q", "mlp.down", "head", "norm"} <= {role for site in told["sites"] for role in site["roles"]}
    assert told["absent"] == [], "each of its linear layers has a role"

    status, out, _ = run("methods")
    assert status == 0
    assert "arXiv:2106.09685" in out
    status, out, _ = run("methods", "lora", "--json")
    (lora,) = json.loads(out)
    assert lora["parameters"]["r"]["alias"] == "rank"
    status, _, err = run("methods", "lroa")
    assert status == 1
    assert "methods: adalora, adapter" in err


@pytest.mark.slow
def test_show_writes_each_format(run: Run, model: Path, spec: Path, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"graph.{kind}" for kind in ("html", "dot", "mermaid")}
    status, out, err = run("show", spec, model, *(part for kind, f in files.items() for part in (f"--{kind}", f)))
    assert (status, err) == (0, "")
    assert files["html"].read_text().startswith("<!doctype html>")
    assert files["dot"].read_text().startswith("digraph")
    assert "flowchart" in files["mermaid"].read_text()
    status, out, _ = run("show", spec, model, "--after", "weight methods")
    assert status == 0
    assert "lora" in out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["compile", "{spec}", "nowhere.py:make"], "bad-reference"),
        (["compile", "{spec}", "./nowhere"], "bad-reference"),
        (["compile", "{spec}", "{tmp}/empty"], "bad-reference"),
        (["compile", "{spec}", "{tmp}/factory.py"], "bad-reference"),
        (["compile", "{spec}", "{tmp}/factory.py:absent"], "bad-reference"),
        (["compile", "{spec}", "{tmp}/factory.py:number"], "bad-reference"),
        (["compile", "{tmp}/missing.peft", "{model}"], "unreadable-file"),
        (["merge", "{tmp}/empty", "-o", "{tmp}/out"], "bad-artifact"),
    ],
)
def test_mistakes_end_in_a_diagnostic(
    run: Run, model: Path, spec: Path, tmp_path: Path, arguments: list[str], code: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "factory.py").write_text("def make():\n    return None\n\n\ndef number():\n    return 7\n")
    places = {"spec": spec, "tmp": tmp_path, "model": model}
    status, out, err = run(*(argument.format(**places) for argument in arguments))
    assert (status, out) == (1, "")
    assert f"error[{code}]" in err
    assert "Traceback" not in err


def test_a_text_where_a_file_is_expected_is_known(run: Run) -> None:
    status, _, err = run("check", "apply lora(r=8) to attn.q")
    assert status == 1
    assert "a spec is a file here: write its text into one" in err


@pytest.mark.parametrize("arguments", [["compile"], ["plan", "a", "b", "--batch", "0"], ["nonsense"], []])
def test_wrong_usage_ends_with_two(run: Run, arguments: list[str]) -> None:
    status, _, err = run(*arguments)
    assert status == 2
    assert "usage: peftc" in err


def test_a_crash_shows_its_traceback_only_when_asked(
    run: Run, spec: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(peftc, "plan", crash, raising=False)
    status, _, err = run("plan", spec, model)
    assert status == 1
    assert "ZeroDivisionError: boom" in err
    assert "Traceback" not in err
    monkeypatch.setenv("PEFTC_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("plan", spec, model)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a spec was parsed and resolved, by whatever name a module knows the function that does it."""
    found: Counter[str] = Counter()

    def count(function: Callable[..., Any]) -> None:
        def counted(*given: Any, **options: Any) -> Any:
            found[function.__name__] += 1
            return function(*given, **options)

        places = [
            (module, name)
            for path, module in sys.modules.items()
            if path.split(".")[0] == "peftc"
            for name, value in vars(module).items()
            if value is function
        ]
        for module, name in places:
            monkeypatch.setattr(module, name, counted)

    count(read_file)
    count(resolve)
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "{spec}"),
        ("plan", "{spec}", "{model}"),
        ("compile", "{spec}", "{model}", "-o", "{output}"),
        pytest.param(("compile", "{packed}", "{model}"), marks=pytest.mark.slow),
        ("show", "{spec}", "{model}", "--dtype", "bfloat16"),
        pytest.param(("bench", "{spec}", "{model}", "--repeats", "1", "--seq", "8"), marks=pytest.mark.slow),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_command_reads_its_spec_once(
    run: Run, calls: Counter[str], model: Path, spec: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    packed = tmp_path / "packed.peft"
    packed.write_text(f"quantize linear except head with nf4\n{SPEC}")
    places = {"spec": spec, "packed": packed, "model": model, "output": tmp_path / "artifact"}
    status, _, err = run(*(argument.format(**places) for argument in arguments))
    assert (status, err) == (0, "")
    assert calls == {"read_file": 1, "resolve": 1}


def test_usage_does_not_wait_for_torch() -> None:
    """A stranger's first commands answer at once; transformers' own options are in `peftc train --help-all`."""
    code = """
import contextlib, sys
from peftc.cli import COMMANDS, main
for arguments in [], *([name] for name in COMMANDS):
    with contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    if not arguments:
        assert not {"lark", "regex"} & set(sys.modules)
print({"rich", "torch", "transformers"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("usage: peftc") == 1 + len(COMMANDS)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("path", sorted((ROOT / "peftc" / "cli").glob("*.py")), ids=lambda path: path.stem)
def test_what_is_imported_on_demand_is_what_type_checkers_see(path: Path) -> None:
    tree = ast.parse(path.read_text())
    told = {
        alias.asname or alias.name: f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom | ast.Import)
        for alias in node.names
    }
    lazy = {
        ast.unparse(node.targets[0]): node.value.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "Lazy"
        and isinstance(node.value.args[0], ast.Constant)
    }
    assert lazy.items() <= told.items()
    imports = (ast.Import, ast.ImportFrom)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not [node for function in functions for node in ast.walk(function) if isinstance(node, imports)]
