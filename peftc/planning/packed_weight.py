"""A weight that the plan has a storage for: where its packed buffers are, and the weight out of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from peftc.diagnostics.source import Span
from peftc.protocol.storage import Buffer, Storage


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """One weight in one storage. `path` is where the compiled model keeps its buffers.

    `weight` is the tensor's name in the graph, `held` its shape in the base model; `transposed`: its rows are input
    features there. `statement` counts the file's `quantize` statements.
    """

    statement: int
    storage: Storage
    weight: str
    path: str
    held: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool
    span: Span

    @property
    def shape(self) -> tuple[int, ...]:
        """[*batch, n_out, n_in]: the weight as the storage has it."""
        return (*self.held[:-2], self.held[-1], self.held[-2]) if self.transposed else self.held

    @cached_property
    def names(self) -> dict[str, str]:
        """The full name of each buffer."""
        return {name: f"{self.path}.{name}" for name in self.storage.buffers(self.shape, self.dtype)}

    @cached_property
    def buffers(self) -> dict[str, Buffer]:
        """Full name -> what `pack` makes."""
        packed = self.storage.buffers(self.shape, self.dtype)
        return {full: packed[name] for name, full in self.names.items()}

    @property
    def first(self) -> str:
        """The full name of one of the buffers, for where they are."""
        return next(iter(self.buffers))

    @property
    def bytes(self) -> int:
        """What the packed weight takes."""
        return sum(buffer.bytes for buffer in self.buffers.values())

    @property
    def dense_bytes(self) -> int:
        """What the weight takes in the base model."""
        return prod(self.held) * self.dtype.itemsize

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Full name -> buffer, of the weight as the base model holds it.

        Raises:
            TypeError: where the storage packs other buffers than it says.
        """
        packed = self.storage.pack(self._turned(weight.detach()))
        made = {name: Buffer.of(buffer) for name, buffer in packed.items()}
        said = self.storage.buffers(self.shape, self.dtype)
        if made != said:
            raise TypeError(f"{type(self.storage).__name__}.pack makes {made}, and its buffers are said to be {said}")
        return {self.names[name]: tensor for name, tensor in packed.items()}

    def packed_as(self, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Full name -> buffer, out of bitsandbytes' state dict; None if that is of another storage."""
        packed = self.storage.from_bitsandbytes(state)
        return packed and {self.names[name]: tensor for name, tensor in packed.items()}

    def to_bitsandbytes(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """bitsandbytes' state dict of a layer with this weight, of its buffers by full name; None where it has none."""
        packed = {name: buffers[full] for name, full in self.names.items()}
        return self.storage.to_bitsandbytes(self.shape, self.dtype, packed)

    def unpack(self, buffers: Mapping[str, Tensor]) -> Tensor:
        """The weight as the base model held it (a view, where that is transposed), out of its buffers by full name."""
        packed = {name: buffers[full] for name, full in self.names.items()}
        return self._turned(self.storage.unpack(self.shape, self.dtype, **packed))

    def _turned(self, weight: Tensor) -> Tensor:
        return weight.transpose(-2, -1) if self.transposed else weight
