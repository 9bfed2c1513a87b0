"""What a command says where somebody took the wrong folder, model or column: what to do next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.table import Table

from peftc.diagnostics.diagnostic import PeftcError
from peftc.files.repack import Rounding
from peftc.planning.memory import Memory
from peftc.show.screen import rendered
from peftc.show.tables import MOST_LOST, lost_table, memory_table
from peftc.training.columns import gathered
from peftc.training.records import read

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("artifact/peftc.json", "its artifact in a folder of its own: {folder}/artifact"),
        ("adapter_config.json", "peftc.load_peft(model, folder)"),
        ("config.json", "a whole model"),
    ],
)
@pytest.mark.parametrize("command", [("generate", "--prompt", "a"), ("merge", "-o", "out")])
def test_what_is_no_artifact_is_told_for_what_it_is(
    file: str, said: str, command: tuple[str, ...], tmp_path: Path, run: Run
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    status, _, err = run(command[0], tmp_path, *command[1:])
    assert status == 1
    assert said.format(folder=tmp_path) in err


def test_a_module_of_a_file_says_how_its_inputs_are_told(tmp_path: Path, run: Run) -> None:
    """And what its own code raises is one line, with its place."""
    code = (
        "import torch\n\ndef bare():\n    return torch.nn.Linear(4, 4)\n\ndef wrong():\n    raise ValueError('a\\nb')\n"
    )
    (tmp_path / "own.py").write_text(code)
    (tmp_path / "spec.peft").write_text("apply lora(r=2) to linear\n")
    status, _, err = run("plan", tmp_path / "spec.peft", f"{tmp_path}/own.py:bare")
    assert (status, "returns both, (model, example)" in err) == (1, True)
    status, _, err = run("plan", tmp_path / "spec.peft", f"{tmp_path}/own.py:wrong")
    assert (status, "ValueError: a (line 7)" in err) == (1, True)


def test_two_columns_are_told_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"document": "a", "summary": "b"}\n')
    with pytest.raises(PeftcError, match="--columns prompt=document completion=summary"):
        gathered([(str(tmp_path / "data.jsonl"), read(str(tmp_path / "data.jsonl")))], {}, "")


def test_a_heading_is_one_line() -> None:
    table: Table = memory_table(Memory(weights=1, gradients=1, optimizer=1, activations=1), 1, 512, "adamw")
    assert rendered(table, width=80).splitlines()[0].rstrip() == "one step: batch 1, sequence 512, adamw"


def test_of_many_weights_those_are_told_that_lose_the_most() -> None:
    lost = {f"w{i}": Rounding(largest=100.0 - i, relative=i / 1000) for i in range(200)}
    lines = rendered(lost_table(lost), width=80).splitlines()
    assert [line.split()[1] for line in lines if "│ w" in line] == [f"w{i}" for i in range(200 - MOST_LOST, 200)]
    assert [part.strip() for part in lines[-2].split("│")[1:-1]] == ["190 more, at most", "100", "18.9000%"]
    assert "more" not in rendered(lost_table({"w": Rounding(1.0, 0.1)}), width=80)
