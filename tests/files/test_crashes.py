"""A save that is killed, or fails, leaves what was there or what was to be, and nothing else once the next is done."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.utils import logging

import peftc
from crashes import failures, kills
from peftc.files import artifact
from peftc.files import folder as folders
from peftc.files.errors import BadArtifact
from peftc.files.folder import COMMITTED, current, write_folder
from peftc.files.hf_peft import folder as peft_folder
from peftc.files.merge import save_merged
from subjects import compiled
from zoo import ZOO

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
QUICK = [(a_trainers_folder, "exchanged"), (a_trainers_folder, "committed")]
ALL_PLACES = [
    pytest.param(place, how, marks=[] if (place, how) in QUICK else pytest.mark.slow)
    for place in PLACES
    for how in ("exchanged", "committed", "copied")
]


@pytest.fixture(autouse=True)
def nothing_written_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed leaves the disk to the system: no need to wait for it."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system exchanges folders; where one is mounted, it does not move files into it either."""
    rename = Path.rename

    def refused(_one: Path, _other: Path) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def rename_inside(self: Path, target: Path) -> Path:
        if target.name == COMMITTED and target.parent not in self.parents:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(self, target)

    if request.param != "exchanged":
        monkeypatch.setattr(folders, "exchange", refused)
    if request.param == "copied":
        monkeypatch.setattr(Path, "rename", rename_inside)
    return bool(request.param == "exchanged")


class Room:
    """A folder with what a save is to replace in it, as often as wanted."""

    def __init__(self, room: Path, place: Callable[[Path], None]) -> None:
        self.room, self.folder, self.place = room, room / "adapter", place
        self.prepare()
        self.before = found(self.folder)

    def prepare(self) -> None:
        shutil.rmtree(self.room, ignore_errors=True)
        self.room.mkdir()
        self.place(self.folder)

    def look(self, at_once: bool = False) -> bool:
        """Whether the new is there; it is that or the old, and with `at_once` for those who do not know of peftc."""
        now = {name: current(self.folder, name).read_bytes() for name in NEW if current(self.folder, name).exists()}
        assert now == NEW or now == {name: data for name, data in self.before.items() if name in NEW}
        plain = {name: data for name, data in found(self.folder).items() if not name.startswith(COMMITTED[:7])}
        assert plain in (self.before, self.before | NEW) or (not at_once and LAST not in plain)
        assert self.before.items() - OLD.items() <= plain.items(), "a file of somebody else's is gone"
        return now == NEW

    def save_again(self) -> None:
        """The next save leaves what it writes, and nothing of those before it."""
        write_folder(self.folder, NEWER)
        assert found(self.folder) == self.before | NEWER
        assert {path.name for path in self.room.iterdir()} <= {"adapter", "elsewhere", "run"}
        assert not [path for path in self.room.rglob("*") if path.name.startswith(".")]
        assert self.folder.is_symlink() == (self.place in (a_link, a_link_to_nothing))


@pytest.mark.parametrize(("place", "exchange"), ALL_PLACES, indirect=["exchange"])
def test_a_save_killed_at_any_operation(tmp_path: Path, place: Callable[[Path], None], exchange: bool) -> None:
    room = Room(tmp_path / "room", place)
    states = set()
    for _ in kills(lambda: write_folder(room.folder, NEW), room.prepare):
        states.add(room.look(at_once=exchange and place is not a_folder_with_folders))
        room.save_again()
    assert states == {True, False}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(("place", "exchange"), ALL_PLACES, indirect=["exchange"])
def test_a_save_with_an_error_at_any_operation(
    tmp_path: Path, place: Callable[[Path], None], exchange: bool, error: BaseException
) -> None:
    room = Room(tmp_path / "room", place)
    for raised in failures(lambda: write_folder(room.folder, NEW), room.prepare, error):
        assert room.look() or raised, "it was not told"
        if isinstance(raised, peftc.PeftcError):
            assert [diagnostic.code for diagnostic in raised.diagnostics] == ["cannot-write"]
            assert "No space left" in str(raised)
        else:
            assert raised in (None, error)
        room.save_again()


def test_a_save_beside_one_that_goes_on(tmp_path: Path) -> None:
    """What another process writes at the same time is not taken for what a crash left."""
    write(tmp_path / "adapter", OLD)
    with folders.replacing(tmp_path / "adapter", lambda _: None) as slow:
        write_folder(tmp_path / "adapter", NEW)
        write(slow, NEWER)
        assert found(tmp_path / "adapter") == NEW
    assert found(tmp_path / "adapter") == NEWER
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_permissions_stay(tmp_path: Path) -> None:
    write(tmp_path / "adapter", OLD)
    (tmp_path / "adapter").chmod(0o2770)
    write_folder(tmp_path / "adapter", NEW)
    assert (tmp_path / "adapter").stat().st_mode & 0o7777 == 0o2770


def test_new_files_may_be_read_as_any_other(tmp_path: Path) -> None:
    """safetensors makes one for its owner alone, which another user's server could not read."""
    (tmp_path / "any").touch()
    usual = (tmp_path / "any").stat().st_mode
    with folders.replacing(tmp_path / "adapter", lambda _: None) as new:
        save_file({"a": torch.ones(3)}, new / "model.safetensors")
    with folders.new_file(tmp_path / "one", BadArtifact(folder="one", reason="it is there")) as one:
        save_file({"a": torch.ones(3)}, one)
    assert (tmp_path / "adapter" / "model.safetensors").stat().st_mode == usual
    assert (tmp_path / "one").stat().st_mode == usual


def test_the_folder_one_works_in_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "adapter", OLD)
    monkeypatch.chdir(tmp_path / "adapter")
    write_folder(Path(), NEW)
    assert found(Path()) == found(tmp_path / "adapter") == NEW


def test_a_read_while_all_is_replaced(tmp_path: Path) -> None:
    """The old settings never meet the new tensors."""
    write(tmp_path, OLD)
    turns = iter([NEW, NEWER])

    def read() -> list[bytes]:
        first = current(tmp_path, LAST).read_bytes()
        if turn := next(turns, None):
            write_folder(tmp_path, turn)
        return [first, current(tmp_path, "adapter_model.safetensors").read_bytes()]

    assert folders.steadily(tmp_path, tuple(NEW), read) == [NEWER[LAST], NEWER["adapter_model.safetensors"]]


# ---- Names and places -----------------------------------------------------------------------------------------------

LONGEST = 255
NAMES = ["two words", "two\nlines", "Ω 🦙 é", os.fsdecode(b"\xff\xfe latin"), "x" * LONGEST, "-rf", "$(true)'\"",
         "*?[a]", "end/", "a/./b/../c", ".peftc-x", "~", "ending."]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_odd_names(tmp_path: Path, name: str) -> None:
    for files in (OLD, NEW):
        write_folder(Path(f"{tmp_path}/{name}"), files)
        assert found(tmp_path / name) == files
    assert not [path for path in tmp_path.rglob(".peftc-*") if path.name != name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x" * (LONGEST + 1), "name too long"),
        ("nul\0", "null byte"),
        ("\ud800", "surrogates"),
        ("loop", "symbolic links"),
        ("file", "something else"),
        ("file/below", "ot a directory|exists"),
    ],
)
def test_places_where_nothing_can_be(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("years of work")
    with pytest.raises(peftc.PeftcError, match=reason):
        write_folder(tmp_path / name, NEW)
    with pytest.raises(peftc.PeftcError):
        artifact.read(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"loop", "file"}
    assert (tmp_path / "file").read_text() == "years of work"


# ---- Whole models ---------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system takes no file that is larger, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
@pytest.mark.xdist_group("conformance-plain")
def test_an_artifact_loads_whenever_its_save_is_killed(tmp_path: Path) -> None:
    case = compiled("plain", "apply lora(r=2) to attn.q, mlp.down\ntrain norm")
    case.randomise()
    folder = tmp_path / "adapter"
    case.module.save(folder)
    write(folder, OTHERS)
    shutil.copytree(folder, tmp_path / "old")
    old = artifact.read(folder).state
    case.randomise(seed=1)
    new = dict(case.module.state_dict())

    def prepare() -> None:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "old", folder)

    for place in kills(lambda: case.module.save(folder), prepare):
        state = artifact.read(folder).state
        assert any(all(torch.equal(state[name], whole[name]) for name in whole) for whole in (old, new))
        if place % 8 == 0:
            peftc.load(folder, case.subject.base)
    with largest_file(1000), pytest.raises(peftc.PeftcError, match="cannot be written: File too large"):
        case.module.save(folder)
    assert found(folder).keys() == {"peftc.json", "adapter.safetensors", *OTHERS}
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "old"}
    peftc.load(folder, case.subject.base)


@pytest.mark.slow
@pytest.mark.xdist_group("conformance-llama")
def test_hf_pefts_folder_is_the_old_or_the_new_whenever_its_save_is_killed(tmp_path: Path) -> None:
    """Of one rank with another alpha: settings and tensors that do not belong together would load without a word."""
    base, folder = ZOO["llama"](), tmp_path / "adapter"
    first, second = (peftc.compile(base, f"apply lora(r=2, alpha={alpha}) to attn.q") for alpha in (2, 64))
    first.save_pretrained(folder)
    (folder / "README.md").write_text("a model card")
    shutil.copytree(folder, tmp_path / "old")
    second.save_pretrained(tmp_path / "new")
    whole = [found(tmp_path / name) | {"README.md": b"a model card"} for name in ("old", "new")]

    def prepare() -> None:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "old", folder)

    for _ in kills(lambda: second.save_pretrained(folder), prepare):
        assert found(folder) in whole
        assert peft_folder.read(base, folder)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "old", "new"}
    assert json.loads((folder / LAST).read_text())["lora_alpha"] == 64


@pytest.fixture
def no_progress_bars() -> Iterator[None]:
    """All processes share the lock of a progress bar, and one that is killed keeps it."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.mark.slow
@pytest.mark.usefixtures("no_progress_bars")
@pytest.mark.parametrize("name", ["llama", "plain"])
def test_a_merged_model_is_there_whole_or_not_at_all(tmp_path: Path, name: str) -> None:
    merged = compiled(name, "apply lora(r=2) to attn.q").module.merge()
    folder = tmp_path / "merged"
    save_merged(merged, tmp_path / "whole")

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    for _ in kills(lambda: save_merged(merged, folder), prepare):
        if found(folder):
            assert found(folder) == found(tmp_path / "whole")
            with pytest.raises(peftc.PeftcError, match="no empty folder"):
                save_merged(merged, folder)
        else:
            save_merged(merged, folder)
        assert {path.name for path in tmp_path.iterdir()} == {"merged", "whole"}
    prepare()
    with largest_file(1000), pytest.raises(peftc.PeftcError, match=r"(?s)cannot be written: .*[Ff]ile too large"):
        save_merged(merged, folder)
    assert not found(folder)
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "whole"}
