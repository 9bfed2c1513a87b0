"""Checkpoints that bitsandbytes packed: each of its layers' weights, which several tensors of the file stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from peftc.fourbit import FACTS
from peftc.storage import Buffer, storages


class Readable(Protocol):
    """A tensor of a checkpoint, which is read when it is indexed."""

    def __getitem__(self, where: Any) -> Tensor: ...


@dataclass(frozen=True)
class Packed:
    """One packed weight. What it is indexed for is the weight that it stands for.

    `parts`: bitsandbytes' state dict of the layer. `turned`: the model holds the weight as [n_in, n_out].
    """

    parts: Mapping[str, Readable]
    turned: bool = False

    def state(self) -> dict[str, Tensor]:
        """The layer's state dict, read."""
        return {name: part[...] for name, part in self.parts.items()}

    def __getitem__(self, where: Any) -> Tensor:
        try:
            dense = _unpacked(self.state())
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"what bitsandbytes packed cannot be read: {error}") from error
        return (dense.T if self.turned else dense)[where]


def _unpacked(state: Mapping[str, Tensor]) -> Tensor:
    """The weight [n_out, n_in] that a layer's state dict stands for."""
    for kind in storages().values():
        found = kind.of_bitsandbytes(state)
        if found is None:
            continue
        storage, shape, dtype = found
        problem = storage.conflict() or (None if _is_shape(shape) else f"a weight is said to be {list(shape)}")
        if problem:
            raise ValueError(problem)
        buffers = storage.from_bitsandbytes(state)
        if buffers is None:
            break
        expected = storage.buffers(shape, dtype)
        if wrong := [name for name, item in expected.items() if Buffer.of(buffers[name]) != item]:
            raise ValueError(f"{wrong[0]} is not that of a weight of {list(shape)}")
        return storage.unpack(shape, dtype, **buffers)
    raise ValueError(f"no storage reads {', '.join(sorted(state))}")


def _is_shape(shape: tuple[Any, ...]) -> bool:
    return len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)


@dataclass(frozen=True)
class Packing:
    """The packed layers of a checkpoint that is to be written: bitsandbytes' state dict of each, by its path.

    `settings` is the `quantization_config` by which transformers knows them.
    """

    layers: Mapping[str, Mapping[str, Tensor]]
    settings: dict[str, object]

    def in_place_of(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's state dict, with what is packed for what it stands for."""
        kept = {name: tensor for name, tensor in dense.items() if name.removesuffix(".weight") not in self.layers}
        packed = {f"{path}.{name}": item for path, state in self.layers.items() for name, item in state.items()}
        return kept | packed

    @contextmanager
    def said_by(self, config: Any) -> Iterator[None]:
        """Meanwhile the configuration of a model says what is packed."""
        config.quantization_config = self.settings
        try:
            yield
        finally:
            del config.quantization_config


def by_bitsandbytes(config: Any) -> bool:
    """Whether a model's configuration says that bitsandbytes packed its checkpoint."""
    said = getattr(config, "quantization_config", None)
    return isinstance(said, dict) and said.get("quant_method") == "bitsandbytes"


def gathered(tensors: Mapping[str, Readable]) -> dict[str, Readable]:
    """The tensors of a checkpoint, with one `Packed` in the place of all that a packed layer has but its bias."""
    layers = {key.partition(f".weight.{FACTS}")[0] for key in tensors if f".weight.{FACTS}" in key}
    layers |= {key.removesuffix(".SCB") for key in tensors if key.endswith(".SCB")}
    parts: dict[str, dict[str, Readable]] = {layer: {} for layer in layers}
    found: dict[str, Readable] = {}
    for key, tensor in tensors.items():
        layer, name = _split(key)
        if layer in layers and name != "bias":
            parts[layer][name] = tensor
        else:
            found[key] = tensor
    return found | {f"{layer}.weight": Packed(state) for layer, state in parts.items()}


def _split(key: str) -> tuple[str, str]:
    """A layer's path, and which of its tensors: `a.b.weight.absmax` is of `a.b`."""
    if ".weight." in key:
        layer, _, name = key.partition(".weight.")
        return layer, f"weight.{name}"
    layer, _, name = key.rpartition(".")
    return layer, name
