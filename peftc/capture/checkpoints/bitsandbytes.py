"""Checkpoints that bitsandbytes packed: each of its layers' weights, which several tensors of the file stand for."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peftc.capture.checkpoints.ondisk import Readable, on_disk
from peftc.protocol.fourbit import FACTS
from peftc.protocol.storage import Buffer, storages


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
            why = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"what bitsandbytes packed cannot be read: {why}") from error
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
class PackedFile:
    """The packed layers of a checkpoint that is to be written: bitsandbytes' state dict of each, by its path.

    `settings` is the `quantization_config` by which transformers knows them.
    """

    layers: Mapping[str, Mapping[str, Tensor]]
    settings: dict[str, object]

    def saved(self, model: PreTrainedModel, folder: Path) -> bool:
        """Writes `model` with what is packed in place of what it stands for; False, and nothing, where that cannot be.

        transformers writes some models otherwise than they are: layers that are one in its files cannot be packed.
        """
        packed = {f"{path}.{name}": item for path, state in self.layers.items() for name, item in state.items()}
        dense = {name: t for name, t in model.state_dict().items() if name.removesuffix(".weight") not in self.layers}
        model.config.quantization_config = self.settings
        try:
            model.save_pretrained(folder, state_dict=dense | packed)
        finally:
            del model.config.quantization_config
        there = on_disk(sorted(folder.glob("*.safetensors")))
        if all(name in there and torch.equal(there[name][...], item) for name, item in packed.items()):
            return True
        shutil.rmtree(folder)
        return False


def by_bitsandbytes(config: Any) -> bool:
    """Whether a model's configuration says that bitsandbytes packed its checkpoint."""
    said = getattr(config, "quantization_config", None)
    if not isinstance(said, dict):
        return False
    method = said.get("quant_method")  # older files do without
    return method == "bitsandbytes" or (method is None and bool(said.get("load_in_4bit") or said.get("load_in_8bit")))


def gathered(tensors: Mapping[str, Readable]) -> dict[str, Readable]:
    """The tensors of a checkpoint, with one `Packed` in the place of all that a packed layer has but its bias."""
    layers = {key.partition(f".weight.{FACTS}")[0] for key in tensors if f".weight.{FACTS}" in key}
    layers |= {key.rpartition(".")[0] for key in tensors if key.endswith((".SCB", ".weight_format"))}
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
