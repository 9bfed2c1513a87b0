"""A process that fails as it writes files: once before each of its operations on them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import BuiltinFunctionType, FrameType
from typing import Any

# What changes files or folders; `open` makes one.
OPERATIONS = {
    "open", "write", "mkdir", "rmdir", "rename", "replace", "link", "symlink", "unlink", "remove", "chmod", "chown",
    "utime", "truncate", "setxattr", "flock", "serialize_file", "write_record",
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


def failures(
    action: Callable[[], object], prepare: Callable[[], object], error: BaseException
) -> Iterator[BaseException | None]:
    """Runs `action` after `prepare` with `error` in the place of its nth operation, for every n.

    Yields what the action raised, and ends when it was done before.
    """
    for place in count():
        prepare()
        raised = None
        with _before(place, error) as met:
            try:
                action()
            except BaseException as found:
                raised = found
        if not met:
            assert raised is None
            return
        yield raised


def _run(action: Callable[[], object], place: int) -> None:
    """In the child: the action, until it is about to do operation `place`."""
    signal.alarm(60)  # rather than wait for ever for a lock that a thread of the parent's had
    try:
        with _before(place, None):
            action()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


@contextmanager
def _before(place: int, error: BaseException | None) -> Iterator[list[str]]:
    """Raises `error`, or is killed, in the place of one operation; what is yielded holds its name then."""
    done = 0
    met: list[str] = []

    def watch(_frame: FrameType, event: str, called: Any) -> None:
        nonlocal done
        if event == "c_call" and isinstance(called, BuiltinFunctionType) and called.__name__ in OPERATIONS:
            done += 1
            if done == place + 1:
                if error is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                else:
                    met.append(called.__name__)
                    raise error

    sys.setprofile(watch)
    try:
        yield met
    finally:
        sys.setprofile(None)
