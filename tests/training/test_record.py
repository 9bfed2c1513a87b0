"""Whose a folder is, and from which checkpoint a run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftc.diagnostics.diagnostic import PeftcError
from peftc.training.record import claim, described


def checkpoint(folder: Path, step: int, state: str = "{}") -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (made / "trainer_state.json").write_text(state)
    return made


def test_a_run_that_came_to_nothing_gives_way(tmp_path: Path) -> None:
    """Such as one whose spec did not fit the model."""
    one, other = (described(spec, "m", [], {}) for spec in ("a", "b"))
    claim(tmp_path, one, fresh=False)
    claim(tmp_path, other, fresh=False)
    assert json.loads((tmp_path / "run.json").read_text()) == other
    checkpoint(tmp_path, 1)
    with pytest.raises(PeftcError, match="another spec"):
        claim(tmp_path, one, fresh=False)
    (tmp_path / "merged").mkdir()
    claim(tmp_path, one, fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_run_goes_on_from_its_last_whole_checkpoint(tmp_path: Path) -> None:
    run = described("a", "m", [], {"max_steps": 3})
    claim(tmp_path, run, fresh=False)
    whole, cut = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10, '{"global_st')
    claim(tmp_path, described("a", "m", [], {"max_steps": 30}), fresh=False)
    assert (whole.exists(), cut.exists()) == (True, False)


def test_data_in_a_folder_is_known_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    before = described("a", "m", [str(tmp_path)], {})
    assert described("a", "m", [str(tmp_path)], {}) == before
    assert described("a", "m", [f"{tmp_path}:main"], {})["data"] == {f"{tmp_path}:main": before["data"][str(tmp_path)]}
    (tmp_path / "b.txt").write_text("b")
    assert described("a", "m", [str(tmp_path)], {}) != before


def test_a_folder_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a")
    with pytest.raises(PeftcError, match="--output"):
        claim(tmp_path / "file", described("a", "m", [], {}), fresh=False)
