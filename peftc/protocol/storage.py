"""What a storage is: how a frozen weight lies in memory, as packed buffers, and how it is read.

Whoever reads the weight reads `unpack` of the buffers: a storage changes an operand, a method what is computed with it,
so each goes with each. A file under `passes/storage` is one format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TypeVar, cast

from peftc.protocol import Tensor, torch
from peftc.protocol.params import Configured, demand, param, register, registered

__all__ = ["Buffer", "Storage", "param", "storage", "storages"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """One packed tensor, before there is one."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Buffer:
        """What a tensor is."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def bytes(self) -> int:
        """How much memory it takes."""
        return prod(self.shape) * self.dtype.itemsize


class Storage(Configured):
    """Base of every storage of a frozen weight W [*batch, n_out, n_in], in the order its rows are output features.

    A weight that the model holds the other way around ([*batch, n_in, n_out]) is turned before `pack` and after
    `unpack`; of a fused weight the whole is packed. `batch` is that of stacked experts, else empty.

    A subclass, under `@storage`, gives `name`, `formula`, `paper`, a docstring, its parameters (`param`), `buffers`,
    `pack` and `unpack`. What is here of bitsandbytes is for storages that it has, too: the others leave it as it is.
    """

    noun = "storage"
    such_as = "nf4(double=true)"
    folder = "storage"

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be packed so, or None."""
        return None

    def buffers(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Buffer]:
        """What `pack` returns of a weight of this shape and dtype: every name, shape and dtype, exactly.

        The names are those by which `unpack` is given them, and none that a torch module has already.
        """
        raise NotImplementedError

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """The numbers that stand for `weight`, on its device. A strided view is as good as a contiguous tensor."""
        raise NotImplementedError

    def unpack(self, shape: tuple[int, ...], dtype: torch.dtype, **buffers: Tensor) -> Tensor:
        """The weight as it is computed with: `shape` and `dtype` are those of the weight that was packed.

        It is traced into the graph as it is and runs in every forward pass; no gradient goes through it. An operation
        of `peftc.kernels` does in one step what would take several.
        """
        raise NotImplementedError

    @classmethod
    def check(cls) -> None:
        """Raises TypeError where the class lacks what every storage has."""
        demand(
            cls, Storage, buffers="it says what `pack` returns", pack="it makes the buffers out of a weight",
            unpack="it makes the weight out of the buffers",
        )  # fmt: skip

    def rounded(self, weight: Tensor) -> Tensor:
        """`weight` as it comes back from being packed."""
        return self.unpack(tuple(weight.shape), weight.dtype, **self.pack(weight))

    def to_bitsandbytes(
        self, shape: tuple[int, ...], dtype: torch.dtype, buffers: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """bitsandbytes' state dict of a layer with this weight, by what stands behind the layer's own path.

        None where it has no such layer.
        """
        return None

    def bitsandbytes_settings(self, dtype: torch.dtype) -> dict[str, object] | None:
        """What transformers' `BitsAndBytesConfig` calls this, for a model that computes in `dtype`, or None."""
        return None

    @classmethod
    def of_bitsandbytes(cls, state: Mapping[str, Tensor]) -> tuple[Storage, tuple[int, ...], torch.dtype] | None:
        """Which storage of this kind wrote such a state dict, of a weight of what shape and dtype; None if none did.

        Raises:
            ValueError: if what the file says of itself cannot be read.
        """
        return None

    def from_bitsandbytes(self, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The buffers out of what `to_bitsandbytes` writes, or None if that was packed with other parameters."""
        return None


S = TypeVar("S", bound=type[Storage])


def storage(cls: S) -> S:
    """Registers a storage under its `name` and turns its fields into parameters."""
    return register(cls)


def storages() -> Mapping[str, type[Storage]]:
    """Every storage by name: each is in a file of that name under `passes/storage`."""
    return cast(Mapping[str, type[Storage]], registered(Storage))
