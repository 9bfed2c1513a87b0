"""Writing a folder so that whoever reads it, at any instant, finds what was there before or what is there now.

New files are made out of sight, in a folder `.peftc-…` beside their place, and put there in one step:

- Where nothing is, they are renamed into place.
- Where a folder is, the two are exchanged, which Linux does at once; other files of the old one are linked into the new
  one first.
- Where that cannot be (other systems and some file systems, mount points, a folder that holds folders), they go into a
  folder inside the old one, which gets its name, `.peftc-new`, once it is whole: from then on `current` finds them
  there. They move to their own places one by one, and the next save does what a crash left undone.

What a process that is killed leaves is read by nobody, and removed by the next save.
"""

from __future__ import annotations

import errno
import filecmp
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from peftc.diagnostics.diagnostic import Diagnostic, PeftcError
from peftc.files.errors import BadArtifact, CannotWrite
from peftc.files.exchange import exchange, remove_abandoned, scratch, sync, sync_folder

HIDDEN = ".peftc-"
COMMITTED = f"{HIDDEN}new"
# By these files readers know what a folder is and what its other files mean: they come last.
LAST = ("peftc.json", "adapter_config.json", "config.json")
T = TypeVar("T")


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Writes `files` into a folder, which is new or has them replaced, all at once; other files in it are left alone.

    Raises:
        PeftcError: `bad-artifact` if something that is no folder, or a folder of other things, stands at `folder`;
            `cannot-write` where the system refuses. What is there stays.
    """

    def problem(there: set[str] | None) -> Diagnostic | None:
        if there is None or (there and not there & files.keys()):
            return BadArtifact(folder=str(folder), reason="something else is there, and is left alone")
        return None

    with replacing(folder, problem) as new:
        for name, data in files.items():
            (new / name).write_bytes(data)


@contextmanager
def new_file(path: Path, problem: Diagnostic) -> Iterator[Path]:
    """Where to write a file that is at `path` at the end, whole, and not before. Nothing that is there is replaced.

    Raises:
        PeftcError: `problem` if anything is there; `cannot-write` where the system refuses.
    """
    try:
        mark = _mark(path)
        if os.path.lexists(path):
            raise PeftcError(problem)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent, mark)
        with scratch([path.parent], mark) as room:
            new = room / path.name
            yield new
            _with_usual_modes(room)
            sync(room)
            try:
                os.link(new, path)
            except FileExistsError:  # came meanwhile
                raise PeftcError(problem) from None
            except OSError:  # a file system without links
                new.rename(path)
            sync_folder(path.parent)
    except OSError as error:
        raise PeftcError(CannotWrite(folder=str(path), reason=error.strerror or str(error))) from None


@contextmanager
def replacing(folder: Path, problem: Callable[[set[str] | None], Diagnostic | None]) -> Iterator[Path]:
    """A new folder to write into, whose files are in `folder` at the end; a link to a folder is followed.

    Args:
        folder: where the files go.
        problem: says from the names of what is there, None where that is no folder, why nothing may go there.

    Raises:
        PeftcError: `problem`'s; `cannot-write` where the system refuses. What is there stays.
    """
    try:
        place = _followed(folder)
        mark = _mark(place)
        remove_abandoned(place.parent, mark)
        if place.is_dir():
            remove_abandoned(place, mark)
            _settle(place)
        if found := problem(_names(place)):
            raise PeftcError(found)
        for parent in (folder.parent, place.parent):  # of `a/../b`, a must be there to find b by the same words
            parent.mkdir(parents=True, exist_ok=True)
        with scratch(_rooms(place), mark) as room:
            new = room / "new"
            new.mkdir()
            yield new
            _with_usual_modes(new)
            sync(new)
            _put(new, place)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise PeftcError(CannotWrite(folder=str(folder), reason=reason)) from None


def _with_usual_modes(folder: Path) -> None:
    """Lets those read the files who may read any new one: safetensors writes its own for their owner alone."""
    probe = folder / f".{os.getpid()}"
    probe.touch(exist_ok=False)
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def current(folder: Path, name: str) -> Path:
    """Where a file of `folder` is: in its place, or still where a save that was cut short has committed it."""
    committed = folder / COMMITTED / name
    return committed if os.path.lexists(committed) else folder / name


def steadily(folder: Path, names: tuple[str, ...], read: Callable[[], T]) -> T:
    """What `read` makes of the files of these names; once more if they were replaced meanwhile."""
    while True:
        before = _state(folder, names)
        try:
            found = read()
        except PeftcError:
            if _state(folder, names) == before:
                raise
        else:
            if _state(folder, names) == before:
                return found


def _mark(place: Path) -> str:
    """How the names of folders begin in which what goes to `place` is made."""
    return f"{HIDDEN}{hashlib.sha256(os.fsencode(place.name)).hexdigest()[:12]}-"


def _state(folder: Path, names: tuple[str, ...]) -> list[object]:
    """Changes whenever one of the files does."""
    found: list[object] = []
    for path in (current(folder, name) for name in names):
        with suppress(OSError, ValueError):
            status = path.stat()
            found.append((path, status.st_ino, status.st_mtime_ns, status.st_size))
    return found


def _followed(folder: Path) -> Path:
    try:
        place = Path(os.path.realpath(folder))
        os.fsencode(place)
    except ValueError as error:  # a null byte, or a character that names of files cannot have
        raise OSError(errno.EINVAL, str(error)) from None
    if place.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return place


def _names(place: Path) -> set[str] | None:
    if not place.exists():
        return set()
    return {name for name in os.listdir(place) if not name.startswith(HIDDEN)} if place.is_dir() else None


def _rooms(place: Path) -> list[Path]:
    """Where new files may be made, the best first: not on another file system, which may be full or forgotten."""
    if not place.is_dir():
        return [place.parent]
    return [place.parent, place] if place.stat().st_dev == place.parent.stat().st_dev else [place]


def _put(new: Path, place: Path) -> None:
    """Puts the new files into place."""
    if not place.exists():
        try:
            new.rename(place)
        except OSError:
            if not place.is_dir():  # else somebody else was faster
                raise
        else:
            return sync_folder(place.parent)
    own = set(os.listdir(new))
    try:
        _exchange(new, place)
    except OSError:
        for name in set(os.listdir(new)) - own:
            (new / name).unlink()
        _put_inside(new, place)
    else:
        sync_folder(place.parent)
        with suppress(OSError):
            for name in set(os.listdir(new)) - set(os.listdir(place)):  # came when the others were linked already
                os.rename(new / name, place / name)


def _exchange(new: Path, place: Path) -> None:
    """Exchanges two folders, the new one with the old one's other files, owner and permissions.

    Raises:
        OSError: where that cannot be; nothing was exchanged.
    """
    if place == Path.cwd():  # this process would find itself in the old one
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
    others = set(os.listdir(place)) - set(os.listdir(new))
    if any((place / name).is_dir() and not (place / name).is_symlink() for name in others):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))  # of folders there are no links
    for name in others:
        os.link(place / name, new / name, follow_symlinks=False)
    status = place.stat()
    with suppress(PermissionError):
        os.chown(new, status.st_uid, status.st_gid)
    shutil.copystat(place, new)
    exchange(new, place)


def _put_inside(new: Path, place: Path) -> None:
    """Commits the new files inside the folder, and moves them to their places."""
    try:
        new.rename(place / COMMITTED)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copied = place / new.parent.name
        try:
            shutil.copytree(new, copied)
            sync(copied)
            copied.rename(place / COMMITTED)
        finally:
            shutil.rmtree(copied, ignore_errors=True)
    sync_folder(place)
    _settle(place)


def _settle(place: Path) -> None:
    """Moves what was committed inside a folder to its place.

    Who does not know of it finds no old file that comes last among new ones: for a moment there is none.
    """
    committed = place / COMMITTED
    if committed.is_symlink() or not committed.is_dir():
        return
    names = sorted(os.listdir(committed), key=lambda name: (name in LAST, name))
    if len(names) > 1 and names[-1] in LAST:
        old = place / names[-1]
        if old.is_file() and not filecmp.cmp(old, committed / old.name, shallow=False):
            old.unlink()
    for name in names:
        os.replace(committed / name, place / name)
    committed.rmdir()
