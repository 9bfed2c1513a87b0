"""What a stranger meets: commands that answer at once, tables that say what they are to say, names that are found."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import peftc
from paths import ROOT
from peftc.bench.bench import Bench, Measured
from peftc.bench.table import bench_table
from peftc.capture.checkpoints import naming
from peftc.cli import COMMANDS, FOLDERS
from peftc.protocol.method import methods
from peftc.show.registry import methods_table
from peftc.show.screen import rendered

RECIPES = ROOT / "examples" / "recipes"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", RECIPES / "lora.peft"),
        ("check", RECIPES / "unipelt.peft"),  # combinators are asked what goes into them
        ("check", RECIPES / "qlora.peft"),
        ("check", RECIPES / "compacter.peft"),
        ("methods",),
        ("methods", "pissa"),
        ("completion", "bash"),
    ],
    ids=lambda arguments: " ".join(Path(part).name for part in arguments),
)
def test_torch_is_not_waited_for(arguments: tuple[object, ...]) -> None:
    code = """
import sys
from peftc.cli import main
status = main(sys.argv[1:])
assert not {"torch", "transformers"} & set(sys.modules), "imported"
sys.exit(status)
"""
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, check=True)


def test_a_wrong_spec_and_a_wrong_folder_are_said_before_torch_is_there(tmp_path: Path) -> None:
    (tmp_path / "wrong.peft").write_text("apply lora(rnak=8) to attn.q\n")
    code = """
import sys
from peftc.cli import COMMANDS, main
for arguments in [("plan", "wrong.peft", "./nowhere"), ("compile", str(sys.argv[1]), "./nowhere"), ("sites", "no/")]:
    assert main(arguments) == 1
assert not {"torch", "transformers"} & set(sys.modules), "imported"
"""
    command = [sys.executable, "-c", code, str(RECIPES / "lora.peft")]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    assert told.count("error[") == 3
    assert told.count("there is no such folder") == 2


def test_every_command_by_python_and_its_version() -> None:
    shown = subprocess.run([sys.executable, "-m", "peftc", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"peftc {peftc.__version__}\n"
    assert all((ROOT / "peftc" / "cli" / FOLDERS.get(name, "") / f"{name}.py").exists() for name in COMMANDS)
    assert set(dir(peftc)) == {*peftc.__all__, "__version__"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_options_and_methods(run: Run, shell: str) -> None:
    status, script, err = run("completion", shell)
    assert (status, err) == (0, "")
    assert all(word in script for word in (*COMMANDS, *methods(), "trust-remote-code", "text-classification"))


@pytest.mark.parametrize("name", methods())
def test_no_text_is_lost_to_markup(run: Run, name: str) -> None:
    """A formula has [n_out, n_in], which rich would take for a style."""
    cls = methods()[name]
    status, page, _ = run("methods", name)
    assert status == 0
    words = " ".join(page.split())
    assert " ".join(cls.formula.split()) in words
    assert " ".join((cls.__doc__ or "").split()) in words
    table = rendered(methods_table(), width=2_000)
    assert cls.formula in table


@pytest.mark.parametrize(("columns", "papers"), [(80, False), (100, True)])
def test_the_table_of_methods_is_whole(run: Run, monkeypatch: pytest.MonkeyPatch, columns: int, papers: bool) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    status, out, _ = run("methods")
    assert status == 0
    head = out.splitlines()[1]
    assert head.endswith("┃")
    assert len(head) == columns
    assert ("paper" in head) is papers
    table = out.partition("quantize SELECTOR with")[0]
    assert all(f" {name} " in table for name in methods())
    assert ("arXiv:2106.09685" in table) is papers


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("phm", "phm: n small matrices"),
        ("pissa", "pissa is written: lora(init=pissa)"),
        ("PiSSA", "lora: A frozen weight"),
        ("qlora", "nf4: Sixteen levels"),
        ("bitfit", "bitfit is written: train bias"),
    ],
)
def test_what_is_meant_is_found(run: Run, asked: str, found: str) -> None:
    status, out, err = run("methods", asked)
    assert (status, err) == (0, "")
    assert found in out


def test_what_is_near_is_said(run: Run) -> None:
    status, out, err = run("methods", "lroa")
    assert (status, out) == (1, "")
    assert "did you mean 'lora'?" in err


def test_show_obeys_json(run: Run, llama: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.peft"
    spec.write_text("apply lora(r=2) to attn.q\n")
    status, out, err = run("show", spec, llama, "--json", "--after", "weight methods")
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert (told["model"], told["block"], told["after"]) == ("LlamaForCausalLM", "model.layers.0", "weight methods")
    ids = {node["id"] for node in told["nodes"]}
    assert {edge[end] for edge in told["edges"] for end in ("source", "target")} <= ids
    assert told["inserted"] == sum(node["inserted"] for node in told["nodes"]) > 0
    status, out, _ = run("show", spec, llama, "--json", "--dot", tmp_path / "graph.dot")
    assert json.loads(out) == {"written": {"dot": str(tmp_path / "graph.dot")}}


def test_fusions_that_there_is_nothing_for_are_not_told(run: Run, llama: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.peft"
    spec.write_text("apply lora(r=2) to attn.q\n")
    _, out, _ = run("compile", spec, llama)
    assert "lora_linear" in out
    assert not [rule for rule in ("adapter", "expert_lora", "row_lengths", "spelt_gelu") if rule in out]
    _, out, _ = run("compile", spec, llama, "--verbose")
    assert all(rule in out for rule in ("adapter", "expert_lora", "row_lengths", "spelt_gelu"))


def test_the_table_of_bench_keeps_its_digits_in_80_columns() -> None:
    rows = (
        Measured("frozen base", 12.3456, 123_456_789, 223_456_789, 123_456_000_000, 2.34567),
        Measured("HF PEFT, torch.compile", 14.3456, 153_456_789, 253_456_789, 133_450_000_000, 2.34567),
    )
    table = bench_table(Bench("Llama", "spec", 8, 2048, "bfloat16", "cpu", 2, 5, rows))
    for width in (80, 120):
        text = rendered(table, width=width)
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        for figure in ("12.3456 s", "14.3456 s", "123.46 MB", "253.46 MB", "133.45", "2.34567", "1.16", "1.24", "1.08"):
            assert figure in text, (width, figure)


def test_a_model_that_is_nowhere_is_said_at_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One question, of which the answer is waited for five seconds: not six within half a minute."""
    asked = []

    class Unreachable:
        def head(self, url: str, timeout: float) -> None:
            asked.append((url, timeout))
            raise OSError("no way there")

    monkeypatch.setattr("huggingface_hub.get_session", Unreachable)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    start = time.monotonic()
    status, _, err = run("sites", "nobody/has-this")
    assert time.monotonic() - start < 5
    assert status == 1
    assert "there is no such folder, and the hub cannot be asked for it: no way there" in err
    ((url, timeout),) = asked
    assert url.endswith("nobody/has-this/resolve/main/config.json")
    assert timeout == naming.SECONDS_TO_ANSWER


def test_a_model_gets_the_head_that_is_asked_for(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    BertModel(config).save_pretrained(tmp_path / "bert")
    spec = tmp_path / "spec.peft"
    spec.write_text("apply lora(r=2) to attn.q\ntrain head\n")
    head = ("--task", "text-classification", "--labels", 3)
    status, out, err = run("plan", spec, tmp_path / "bert", *head, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["trainable"] == 2 * (32 + 32) + 3 * 32 + 3
    status, out, err = run("compile", spec, tmp_path / "bert", *head, "-o", tmp_path / "build")
    assert (status, err) == (0, "")
    merged: Any = peftc.load(tmp_path / "build").merge()  # the artifact knows which head it was
    assert type(merged).__name__ == "BertForSequenceClassification"
    assert merged.config.num_labels == 3
    status, _, err = run("sites", tmp_path / "bert", "--task", "image-classification")
    assert status == 1
    assert "transformers has no Bert for image-classification" in err
    (tmp_path / "own.py").write_text("def make(): ...\n")
    status, _, err = run("sites", f"{tmp_path}/own.py:make", "--labels", 3)
    assert "--task and --labels are for a model that transformers builds" in err
