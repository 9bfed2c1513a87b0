"""A process that is killed as it writes files: once before each of its operations on them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import count
from types import BuiltinFunctionType, FrameType
from typing import Any

# What changes files or folders; `open` makes one.
OPERATIONS = {
    "open", "write", "close", "fsync", "mkdir", "rmdir", "rename", "replace", "link", "symlink", "unlink", "remove",
    "chmod", "chown", "utime", "truncate", "setxattr", "flock", "serialize_file",
}  # fmt: skip


def kills(action: Callable[[], object], prepare: Callable[[], object]) -> Iterator[int]:
    """Runs `action` after `prepare` in a process of its own that is killed before its nth operation, for every n.

    Yields after each kill, and ends when the action was done before.
    """
    for place in count():
        prepare()
        if (process := os.fork()) == 0:
            _run(action, place)
        _, status = os.waitpid(process, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the action failed"
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        yield place


def _run(action: Callable[[], object], last: int) -> None:
    """In the child: the action, until it is about to do operation `last`."""
    done = 0

    def watch(_frame: FrameType, event: str, called: Any) -> None:
        nonlocal done
        if event == "c_call" and isinstance(called, BuiltinFunctionType) and called.__name__ in OPERATIONS:
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1

    try:
        sys.setprofile(watch)
        action()
        sys.setprofile(None)
    except BaseException:
        sys.setprofile(None)
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)
