"""What the system is asked for when a folder is written: to exchange two, to write through, to know what is abandoned.

A folder that is being written is locked by who does it. The system lets go of the lock when the process ends, however
it ends, so what can be locked is abandoned.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h


def exchange(one: Path, other: Path) -> None:
    """Each of two folders gets the other's name, in one step.

    Raises:
        OSError: where the system, the C library or the file system cannot do that.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextmanager
def scratch(rooms: Sequence[Path], mark: str) -> Iterator[Path]:
    """A new, locked folder in the first of `rooms` that takes one, its name `mark` and something more; gone at the end.

    Raises:
        OSError: where none of them does.
    """
    while True:
        folder = _made(rooms, mark)
        with _opened(folder) as lock:
            with suppress(OSError):  # some file systems have no locks: there nothing is ever known to be abandoned
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():  # taken for abandoned before it was locked
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


def _made(rooms: Sequence[Path], mark: str) -> Path:
    for room in rooms[:-1]:
        with suppress(OSError):
            return Path(tempfile.mkdtemp(prefix=mark, dir=room))
    return Path(tempfile.mkdtemp(prefix=mark, dir=rooms[-1]))


@contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def remove_abandoned(room: Path, mark: str) -> None:
    """Removes each folder in `room` that `scratch` made for the same mark, and whose process is gone."""
    with suppress(OSError):
        for name in os.listdir(room):
            if name.startswith(mark):
                _remove_unless_locked(room / name)


def _remove_unless_locked(folder: Path) -> None:
    with suppress(OSError), _opened(folder, os.O_DIRECTORY | os.O_NOFOLLOW) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)


def sync(folder: Path) -> None:
    """Returns when a folder and all in it would survive a loss of power.

    Raises:
        OSError: where a file cannot be written after all, as on a full disk.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            with _opened(path) as descriptor:
                os.fsync(descriptor)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """The names in a folder are written through, on file systems that do so."""
    with suppress(OSError), _opened(folder) as descriptor:
        os.fsync(descriptor)
