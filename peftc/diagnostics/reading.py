"""Reading files that others made: regular ones alone, up to a size, so that none of them hangs or fills the memory."""

from __future__ import annotations

import errno
from pathlib import Path


def read_file(path: Path, most: int) -> bytes:
    """The content of a regular file, links followed, of at most `most` bytes.

    Raises:
        OSError: for anything else; `strerror` says why, in words for a diagnostic.
    """
    if not path.is_file():
        raise OSError(errno.ENOENT, "it is no regular file" if path.exists() else "there is no such file", str(path))
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most >> 20} MiB", str(path))
    return content
