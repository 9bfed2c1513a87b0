"""A compile in parts from the start: no process ever holds the base model, only its parts and one weight at a time.

    shapes -> plan -> passes, over what stands for the weights -> fully_shard -> each weight read, parted, let go of

So what is packed is packed as a whole, and numbers that a storage rounds together are as on one process.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import OffloadPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from peftc.capture.checkpoints.references import Reference, opened, parse_reference
from peftc.capture.inputs import example_inputs
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.timings import Timings
from peftc.distributed.errors import NotOnParts
from peftc.distributed.fsdp import of_all, refuse, shard
from peftc.driver.calibration import refuse_without_data
from peftc.driver.compiled import CompiledModule
from peftc.driver.loading import leaving
from peftc.driver.pipeline import build
from peftc.graph.ir import set_tensor, tensors
from peftc.graph.surroundings import ordinary_tensors
from peftc.rewrite.packed import packed_now
from peftc.runtime.tensors.devices import move_constants
from peftc.spec.check import SpecLike, intend


@ordinary_tensors()
def compile_sharded(
    model: str | Path | Reference,
    spec: SpecLike,
    mesh: DeviceMesh | None = None,
    *,
    example: Any = None,
    fuse: bool = True,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    timings: Timings | None = None,
    reshard_after_forward: bool | int | None = None,
    offload_policy: OffloadPolicy | None = None,
) -> CompiledModule:
    """`peftc.shard(peftc.compile(model, spec))`, where no process ever holds the whole base model.

    All processes call it. Each reads the safetensors files, a weight at a time, and keeps its part of it; packed
    weights are those of one process, and what was added starts as the first process draws it.

    Args:
        model: a folder or hub id with safetensors files.
        spec: as for `peftc.compile`.
        mesh: as for `peftc.shard`.
        example: as for `peftc.compile`.
        fuse: as for `peftc.compile`.
        dtype: as for `peftc.compile`.
        trust_remote_code: as for `peftc.compile`.
        timings: collects seconds by stage.
        reshard_after_forward: as for `peftc.shard`.
        offload_policy: as for `peftc.shard`.

    Raises:
        PeftcError: what `peftc.compile` and `peftc.shard` raise; `not-on-parts` for a model that is read as a whole.
    """
    timings = timings or Timings()
    intentions = intend(spec)
    refuse_without_data(intentions)
    reference = parse_reference(model, trust_remote_code=trust_remote_code)
    checkpoint = opened(reference, dtype=dtype)
    if checkpoint is None:
        hint = "peftc.shard(peftc.compile(…)) reads it so on each process, and parts it then"
        reason = "only a folder or a hub id with safetensors files is read weight by weight"
        raise PeftcError(NotOnParts(what=reference.text, reason=reason, hint=hint))

    def make_example(module: nn.Module, given: Any) -> Any:
        return example_inputs(module, given if example is None else example)

    plan = leaving(reference, checkpoint, intentions, make_example, timings, everything=True)
    refuse(plan)
    mesh = of_all() if mesh is None else mesh
    compiled = build(plan, timings, fuse=fuse, unread=True)
    _without_numbers(compiled)
    _at_home(compiled, mesh)
    shard(compiled, mesh, reshard_after_forward=reshard_after_forward, offload_policy=offload_policy)
    with timings.stage("load"):
        _read_parts(compiled, mesh.device_type)
    return compiled


def _without_numbers(compiled: CompiledModule) -> None:
    """What stood for weights while there were passes becomes parameters and buffers on the meta device."""
    made: dict[int, Tensor] = {}
    for name, tensor in tensors(compiled).items():
        if isinstance(tensor, FakeTensor):
            if id(tensor) not in made:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                learns = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(empty, requires_grad=False) if learns else empty
            set_tensor(compiled, name, made[id(tensor)])
    compiled.settle()


def _at_home(compiled: CompiledModule, mesh: DeviceMesh) -> None:
    """The graphs make their constants where the parts will be."""
    if mesh.device_type == "cpu":
        return
    device = torch.device(mesh.device_type, torch.accelerator.current_device_index())
    for module in list(compiled.modules()):
        if isinstance(module, fx.GraphModule):
            move_constants(module, torch.device("cpu"), device)


def _read_parts(compiled: CompiledModule, device: str) -> None:
    """Reads each weight that has no numbers yet, and keeps this process's part."""
    names: dict[int, list[str]] = defaultdict(list)
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors(compiled).items():
        names[id(tensor)].append(name)
        if (tensor.to_local() if isinstance(tensor, DTensor) else tensor).is_meta:
            parts[name] = tensor
    for name, whole in _wholes(compiled, parts):
        part = parts[name]
        own = _part(whole, part) if isinstance(part, DTensor) else whole.to(device)
        if isinstance(part, nn.Parameter):
            own = nn.Parameter(own, requires_grad=False)
        for alias in names[id(part)]:
            owner, _, leaf = alias.rpartition(".")
            setattr(compiled.get_submodule(owner), leaf, own)
            parts.pop(alias)
    assert not parts


def _wholes(compiled: CompiledModule, parts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    plan = compiled.plan
    for weight, item in plan.packed.items():
        if item.first in parts:
            yield from packed_now(plan, item, plan.captured.frozen(weight)).items()
    for name in list(parts):
        if name in parts:  # else it was read under another name
            yield name, plan.captured.frozen(name)


def _part(whole: Tensor, like: DTensor) -> DTensor:
    """This process's part of a tensor, in memory of its own, which has no room for the rest."""
    mesh, placements = like.device_mesh, like.placements
    shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    mine = whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    own = torch.empty(shape, dtype=whole.dtype, device=mesh.device_type)
    own.copy_(mine)
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=whole.shape, stride=like.stride())
