"""The README is run: its tables come from the registry and from one recorded run, its specs parse, its code works.

So are the tables and commands of the page of measurements; the rest of the documentation is run by tests/docs.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import peftc
from benchmark import recorded, recorded_packing
from paths import ROOT
from peftc.show.registry import methods_by_place

README = ROOT / "README.md"
MEASURED = ROOT / "docs" / "pages" / "measured.md"


def fenced(language: str, page: Path = README) -> list[str]:
    """Every fenced block of a language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for named, text in blocks if named == language]


@pytest.mark.parametrize(
    ("page", "name", "made"),
    [
        (README, "methods", methods_by_place),
        (README, "benchmarks", recorded),
        (MEASURED, "packing", recorded_packing),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_its_tables_are_what_makes_them(
    page: Path, name: str, made: Callable[[], str], request: pytest.FixtureRequest
) -> None:
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    text = page.read_text()
    before, rest = text.split(begin)
    table, after = rest.split(end)
    if request.config.getoption("--update-golden"):
        page.write_text(f"{before}{begin}{made()}\n{end}{after}")
        return
    assert table.strip() == made(), "pytest --update-golden writes it anew"


def test_its_specs_have_no_errors() -> None:
    specs = [block for block in fenced("") if block.startswith("# ") and "apply" in block]
    assert specs
    for spec in specs:
        assert peftc.check(spec) == []


@pytest.mark.slow
def test_its_python_runs(tmp_path: Path) -> None:
    code = "\n".join(fenced("python"))  # the later ones go on from the first
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "build" / "adapter" / "peftc.json").is_file()


@pytest.mark.slow
def test_its_first_command_compiles_the_real_model(tmp_path: Path) -> None:
    """The whole line but for the virtual environment, which CI makes by the line for the tests."""
    (line,) = [line for block in fenced("sh") for line in block.splitlines() if "peftc compile" in line]
    command = shlex.split(line.rpartition("&&")[2])
    assert command[0] == ".venv/bin/peftc"
    output = tmp_path / "lora"
    command = [sys.executable, "-m", "peftc", *command[1:-1], str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM" in done.stdout
    assert (output / "adapter.safetensors").is_file()


def plans() -> list[str]:
    """The commands of the page of measurements that need no more than a config."""
    return [line for block in fenced("sh", MEASURED) for line in block.splitlines() if "peftc plan" in line]


@pytest.mark.slow
@pytest.mark.parametrize("line", plans(), ids=lambda line: line.rpartition("/")[2])
def test_its_plans_come_out(line: str) -> None:
    command = [sys.executable, "-m", "peftc", *shlex.split(line)[1:], "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    if "gpt3" in line:
        assert plan["trainable"] == 37_748_736
    if "opt" in line:
        shown = [f"{plan['memory'][kind] / 1e9:.2f}" for kind in ("weights", "gradients", "optimizer", "activations")]
        assert " · ".join(shown) in MEASURED.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "begins"),
    [
        ("compile_time.py --layers 2 --repeat 1", "2"),
        ("benchmark.py --only experts --repeats 1 --batch 1 --seq 16", "|---"),
        ("benchmark.py --only packing --repeats 1 --texts 1", "|---"),
    ],
)
def test_its_benchmarks_run(command: str, begins: str) -> None:
    """examples/train.py, the other script it names, is run by test_examples.py."""
    script, *arguments = command.split()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, f"examples/{script}", *arguments], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[0].startswith(begins)
