"""Tensors of safetensors files, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from torch import Tensor


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
