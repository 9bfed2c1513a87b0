"""A save that is killed leaves what was there or what was to be there, and nothing else once the next one is done."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from crashes import kills
from peftc.files import folder as folders
from peftc.files.folder import current, replacing, write_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # the child writes files alone

LAST = "adapter_config.json"
OLD, NEW, NEWER = ({"adapter_model.safetensors": name * 9000, LAST: name} for name in (b"old", b"new", b"newer"))
OTHERS = {"optimizer.pt": b"moments", "trainer_state.json": b"{}", "rng_state.pth": b"random"}
Files = dict[str, bytes]


def write(folder: Path, files: Files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def found(folder: Path) -> Files:
    """Each file's bytes, in subfolders, too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def nothing(_: Path) -> None:
    """Nothing is there."""


def an_empty_folder(folder: Path) -> None:
    folder.mkdir()


def an_artifact(folder: Path) -> None:
    write(folder, OLD)


def a_trainers_folder(folder: Path) -> None:
    write(folder, OLD | OTHERS)
    (folder / "latest").symlink_to("nowhere")


def a_folder_with_folders(folder: Path) -> None:
    write(folder, OLD | OTHERS)
    write(folder / "checkpoint-1", OTHERS)


def a_link(folder: Path) -> None:
    write(folder.parent / "elsewhere" / "run", OLD | OTHERS)
    folder.symlink_to("elsewhere/run")


def a_link_to_nothing(folder: Path) -> None:
    folder.symlink_to("run")


PLACES = [nothing, an_empty_folder, an_artifact, a_trainers_folder, a_folder_with_folders, a_link, a_link_to_nothing]


def no_exchange(one: Path, other: Path) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.fixture(params=["exchanged", "one by one"])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param != "exchanged":
        monkeypatch.setattr(folders, "exchange", no_exchange)
    return bool(request.param == "exchanged")


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_save(tmp_path: Path, place: Callable[[Path], None], exchanges: bool) -> None:
    room = tmp_path / "room"
    folder = room / "adapter"

    def prepare() -> None:
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir()
        place(folder)

    prepare()
    before = found(folder)
    at_once = exchanges and place is not a_folder_with_folders
    states = set()
    for _ in kills(lambda: write_folder(folder, NEW), prepare):
        now = {name: current(folder, name).read_bytes() for name in NEW if current(folder, name).exists()}
        assert now == NEW or now == {name: data for name, data in before.items() if name in NEW}
        plain = {name: data for name, data in found(folder).items() if not name.startswith(".")}
        # Who does not know of peftc's ways sees old, new, or, where folders cannot be exchanged, nothing that is whole.
        assert plain in (before, before | NEW) or (not at_once and LAST not in plain)
        assert before.items() - OLD.items() <= plain.items(), "another's file is gone"
        states.add(now == NEW)
        write_folder(folder, NEWER)
        assert found(folder) == before | NEWER
        assert {path.name for path in room.iterdir()} <= {"adapter", "elsewhere", "run"}
        assert not [path for path in room.rglob("*") if path.name.startswith(".")]
    assert states == {True, False}
