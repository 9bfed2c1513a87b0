"""What learns, whole, of a model of which each process has a part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.ir import get_attribute
from peftc.runtime.errors import InParts, OtherProcess


class Split(Protocol):
    """How the processes have parts of a model that is itself smaller on each: by `peftc.tensor_parallel`."""

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the shape that the parameter `name` has here, as the part of the whole that it is."""
        raise NotImplementedError

    def gathered(self, model: Any) -> AbstractContextManager[tuple[Any, bool]]:
        """The model whole, on all processes, and whether this one is to write it."""
        raise NotImplementedError


def is_in_parts(module: nn.Module) -> bool:
    """Whether other processes have what is not here."""
    divided = getattr(module, "split", None) is not None
    return divided or any(isinstance(parameter, DTensor) for parameter in module.parameters())


def needs_whole(module: nn.Module, what: str) -> None:
    """Raises PeftcError `in-parts` where other processes have parts of the model."""
    if is_in_parts(module):
        raise PeftcError(InParts(what=what))


@contextmanager
def whole(module: nn.Module, names: Iterable[str]) -> Iterator[bool]:
    """Puts whole tensors in the place of those that are here in part, and says whether this process is to write.

    All processes that have a part come here: they send one another theirs, one tensor after the other, and leave
    together. Of a model that is whole everywhere each process writes that wants to, and waits for nobody.

    Raises:
        PeftcError: `other-process` where the one that writes could not.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):  # the outermost is left whole by a forward pass
            part.reshard()
    parts = {name: tensor for name in names if isinstance(tensor := get_attribute(module, name), DTensor)}
    if not parts:
        yield True
        return
    for name, tensor in parts.items():
        _put(module, name, gathered(tensor))
    try:
        with one_writes(next(iter(parts.values())).device_mesh) as writes:
            yield writes
    finally:
        for name, tensor in parts.items():
            _put(module, name, tensor)


@contextmanager
def one_writes(mesh: DeviceMesh) -> Iterator[bool]:
    """Says whether this process is the one that writes for all of a mesh, and waits for it.

    Raises:
        PeftcError: `other-process` where it could not.
    """
    failed = torch.ones((), device=mesh.device_type)
    try:
        yield dist.get_rank() == int(mesh.mesh.min())
        failed.zero_()
    finally:
        mine = bool(failed)
        for dimension in range(mesh.ndim):
            dist.all_reduce(failed, group=mesh.get_group(dimension))
    if failed and not mine:
        raise PeftcError(OtherProcess())


def gathered(part: DTensor) -> Tensor:
    """The whole of a tensor, on each process."""
    with torch.no_grad():
        return part.full_tensor()


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    held = module.get_submodule(owner)
    learns = get_attribute(module, name).requires_grad
    if leaf in held._parameters:
        own = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=learns)
        held._parameters[leaf] = own
    else:
        held._buffers[leaf] = tensor
