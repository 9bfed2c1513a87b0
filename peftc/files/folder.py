"""Writing a folder so that it is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from peftc.diagnostics.diagnostic import PeftcError
from peftc.files.errors import BadArtifact


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Writes `files` into a folder, which is new or replaced as a whole; other files in it are left alone.

    Where there are other files, such as a Trainer's, each file is replaced by itself, the last one last.

    Raises:
        PeftcError: `bad-artifact` if something that is no folder, or a folder of other things, stands at `folder`.
    """
    folder = folder.absolute()
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.exists() and (not folder.is_dir() or (there and not there & files.keys())):
        raise PeftcError(BadArtifact(folder=str(folder), reason="something else is there, and is left alone"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, data in files.items():
            _write(temporary / name, data)
        if there <= files.keys():
            _replace(temporary, folder)
        else:
            for name in files:
                os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _replace(temporary: Path, folder: Path) -> None:
    """Renames into place; what stood there is removed only when the new one stands."""
    os.chmod(temporary, 0o755)  # mkdtemp's folder is for the owner alone
    if not folder.exists():
        temporary.rename(folder)
        return
    old = folder.with_name(f"{temporary.name}.old")
    folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
