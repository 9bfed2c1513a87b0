"""Writing one file so that whoever reads it finds what was there before or what is there now."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Writes a file whole or not at all; one that is there keeps its rights, and a link to it stays one."""
    target = os.path.realpath(path)
    temporary = Path(f"{target}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(target):
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
