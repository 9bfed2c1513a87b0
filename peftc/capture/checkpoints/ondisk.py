"""Tensors of safetensors files, read when they are asked for, and whole files of others, of which nothing is taken
for granted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from peftc.graph.surroundings import physical_memory

LARGEST_HEADER = 32 << 20  # bytes, of which it has about a hundred for each tensor
CHUNK = 1 << 24


class Readable(Protocol):
    """A tensor of a checkpoint, which is read when it is indexed."""

    def __getitem__(self, where: Any) -> Tensor: ...


class OnDisk:
    """One tensor of a safetensors file, read when it is indexed; nothing of the file stays open or mapped.

    Pages of a mapped file would count as the process's memory for as long as the mapping is there. `kind` is its dtype,
    as safetensors calls it.
    """

    def __init__(self, file: Path, key: str, kind: str, shape: tuple[int, ...]) -> None:
        self.file = file
        self.key = key
        self.kind = kind
        self.shape = shape

    def __getitem__(self, where: Any) -> Tensor:
        with safe_open(self.file, framework="pt", backend="pread") as shard:
            tensor: Tensor = shard.get_tensor(self.key)
        return tensor[where]


def on_disk(files: Iterable[str | Path]) -> dict[str, OnDisk]:
    """Every tensor of some safetensors files by its name there; of the files only the headers are read."""
    found: dict[str, OnDisk] = {}
    for file in map(Path, files):
        with safe_open(file, framework="pt", backend="pread") as shard:
            headers = {key: shard.get_slice(key) for key in shard.keys()}  # noqa: SIM118 -- no mapping
            facts = {key: (header.get_dtype(), tuple(header.get_shape())) for key, header in headers.items()}
        found |= {key: OnDisk(file, key, *fact) for key, fact in facts.items()}
    return found


def read_tensors(path: Path, checksum: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file, which may have to have a SHA-256.

    Raises:
        ValueError: where it is no whole safetensors file, does not fit its checksum, or takes more than the memory.
        OSError: where it is no regular file, or cannot be read.
    """
    check_header(path)
    if (size := path.stat().st_size) > physical_memory():
        raise ValueError(f"it takes {size:,} bytes, more than the memory of this machine")
    try:
        with safe_open(path, framework="pt", backend="pread") as file:  # which finds what does not fit the header
            if checksum is not None and _sha256(path) != checksum:
                raise ValueError("it is cut short or altered: its checksum does not fit")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no mapping
    except SafetensorError as error:
        raise ValueError(f"it is cut short or altered: {error}") from None


def check_header(path: Path) -> None:
    """Whether a safetensors file is a regular one, with a header that can be read.

    Raises:
        ValueError, OSError: if not.
    """
    if not path.is_file():
        raise FileNotFoundError("it is no regular file" if path.exists() else "there is no such file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > LARGEST_HEADER:
        raise ValueError(f"its header would take {length:,} bytes")


def _sha256(path: Path) -> str:
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            whole.update(chunk)
    return whole.hexdigest()
