"""FSDP2: each process has a part of every tensor, and a block is whole only where and while it runs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import OffloadPolicy, fully_shard

from peftc.diagnostics.diagnostic import PeftcError
from peftc.distributed.errors import NotOnParts
from peftc.driver.compiled import CompiledModule
from peftc.graph.ir import get_attribute, tensors
from peftc.planning.plan import Plan
from peftc.protocol.site import Projection


def shard(
    compiled: CompiledModule,
    mesh: DeviceMesh | None = None,
    *,
    reshard_after_forward: bool | int | None = None,
    offload_policy: OffloadPolicy | None = None,
) -> CompiledModule:
    """Gives each process of a mesh its part of a compiled model, in place: `fully_shard` by block, then the whole.

    Packed weights are in parts as any others. A block whose tensors something outside of it reads (a projection that
    all blocks share) is whole as long as the model's outermost part is. Losses, and what is saved, stay as they were;
    what was added starts as the first process has it.

    Args:
        compiled: the model, as whole on each process, where an optimiser does not have its parameters yet.
        mesh: the processes; all of them by default.
        reshard_after_forward: as of `fully_shard`, for the blocks.
        offload_policy: as of `fully_shard`.

    Raises:
        PeftcError: `not-on-parts` where a method changes whole tensors between steps, or the spec has tasks.
    """
    refuse(compiled.plan)
    for item in compiled.plan.packed.values():
        for full in item.buffers:
            _as_parameter(compiled, full)
    mesh = of_all() if mesh is None else mesh
    _as_on_the_first(compiled, mesh)
    numbers = {parameter for parameter in compiled.parameters() if not parameter.ndim}
    given: dict[str, Any] = {"mesh": mesh, "ignored_params": numbers}
    if offload_policy is not None:
        given["offload_policy"] = offload_policy
    for path in blocks_alone(compiled):
        fully_shard(compiled.get_submodule(path), reshard_after_forward=reshard_after_forward, **given)
    fully_shard(compiled, **given)
    return compiled


def refuse(plan: Plan) -> None:
    """Raises PeftcError `not-on-parts` with all of a plan that reads or writes whole tensors beside the graph."""
    problems = []
    if plan.tasks:
        hint = "compile the spec of one task"
        problems.append(NotOnParts(what="a spec of several tasks", reason="a graph is for one of them", hint=hint))
    for number in dict.fromkeys(binding.statement for binding in plan.bindings):
        members = [binding for binding in plan.bindings if binding.statement == number]
        first, reason = members[0], None
        if any(binding.method.scheduled for binding in members):
            reason = "its schedule changes whole tensors after a step"
        elif any(isinstance(b.site, Projection) and b.method.prepares for b in members):
            reason = "it takes its start out of a frozen weight, which has to be whole where that is loaded again"
        if reason is not None:
            problems.append(NotOnParts(what=first.method.name, reason=reason, span=first.span))
    for held in plan.held():
        if held.learns and not held.shape:
            reason = "it is a single number, which learns"
            problems.append(NotOnParts(what=held.name, reason=reason, span=plan.trained.get(held.name)))
    if problems:
        raise PeftcError(*problems)


def of_all() -> DeviceMesh:
    """The mesh of all processes, on accelerators where there are some."""
    found = torch.accelerator.current_accelerator()
    return init_device_mesh("cpu" if found is None else found.type, (dist.get_world_size(),))


def blocks_alone(compiled: CompiledModule) -> list[str]:
    """The blocks that run as modules and whose tensors nothing else reads, the inner ones first."""
    found = []
    every = tensors(compiled)
    for path in compiled.plan.sites.blocks:
        if not isinstance(compiled.get_submodule(path), fx.GraphModule):
            continue
        prefix = f"{path}."
        own = {id(tensor) for name, tensor in every.items() if name.startswith(prefix)}
        others = {id(tensor) for name, tensor in every.items() if not name.startswith(prefix)}
        read = (str(node.target) for node in compiled.graph.find_nodes(op="get_attr"))
        others |= {id(get_attribute(compiled, name)) for name in read if name.startswith(prefix)}
        if not own & others:
            found.append(path)
    return sorted(found, key=lambda path: -path.count("."))


def _as_on_the_first(compiled: CompiledModule, mesh: DeviceMesh) -> None:
    """What was added is that of the mesh's first process: each may have drawn a start of its own."""
    for name in sorted(compiled.plan.added):
        own = get_attribute(compiled, name).detach()
        sent = own.to(mesh.device_type).contiguous()
        for dimension in reversed(range(mesh.ndim)):
            dist.broadcast(sent, group=mesh.get_group(dimension), group_src=0)
        own.copy_(sent)


def _as_parameter(module: nn.Module, full: str) -> None:
    """What `fully_shard` divides is parameters; a buffer is whole on each process, as one number has to be."""
    owner, _, leaf = full.rpartition(".")
    held = module.get_submodule(owner)
    buffer = held._buffers.get(leaf)
    if buffer is not None and buffer.ndim:
        del held._buffers[leaf]
        held.register_parameter(leaf, nn.Parameter(buffer, requires_grad=False))
