"""Tensor parallelism by roles: each process has some heads of each attention, and some features of each MLP.

The rows of q, k, v, up and gate are divided, and the columns of o and down, with what a method has beside them. So the
base model is made smaller, with what the processes send one another in it, and compiled by the same spec: every pass,
storage and fused operation works on it as on any other. That it computes what the whole one does, and has its
gradients, is then tried on the example, with random numbers for all that learns; nothing that differs is let through.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from peftc.diagnostics.diagnostic import Diagnostic, PeftcError
from peftc.diagnostics.timings import Timings
from peftc.distributed.errors import NotOnParts
from peftc.distributed.fsdp import refuse
from peftc.distributed.trial import compare
from peftc.driver.compiled import CompiledModule
from peftc.driver.pipeline import build
from peftc.driver.planned import plan_model
from peftc.graph.ir import get_attribute
from peftc.graph.surroundings import ordinary_tensors
from peftc.kernels.collectives import shared, summed
from peftc.planning.plan import Plan
from peftc.protocol.site import Linear, Projection
from peftc.rewrite.packed import frozen_weight
from peftc.runtime.module import Runtime
from peftc.runtime.tensors.whole import one_writes

COLUMNS = frozenset({"attn.q", "attn.k", "attn.v", "mlp.up", "mlp.gate"})  # of outputs each process has some
ROWS = frozenset({"attn.o", "mlp.down"})  # of inputs
T = TypeVar("T")


@ordinary_tensors()
def tensor_parallel(compiled: CompiledModule, mesh: DeviceMesh | None = None) -> CompiledModule:
    """A model of which each process has a part of every attention and MLP, made of one that is whole on each.

    All processes are given the same inputs, and return the same. `compiled` stays as it is, with its base model, which
    may be on the CPU: what is saved is put into it first.

    Args:
        compiled: the same on all processes.
        mesh: the processes, in one dimension; all of them by default.

    Raises:
        PeftcError: `not-on-parts` where a method, a storage or the model cannot be divided so.
    """
    if mesh is None:
        mesh = init_device_mesh(compiled.device.type, (dist.get_world_size(),))
    refuse(compiled.plan)
    cuts = _cuts(compiled.plan, mesh.size())
    _refuse_trained(compiled.plan, cuts)
    base = _smaller(compiled, cuts, mesh)
    plan = _agree(mesh, lambda: _planned(base, compiled, mesh))
    split = Divided(compiled, mesh, _dimensions(compiled.plan, plan))
    state = {name: split.mine(name, get_attribute(compiled, name).detach()) for name in compiled.plan.added}
    made = build(plan, Timings(), state, fuse=compiled.is_fused)
    made.__dict__["split"] = split
    _agree(mesh, lambda: _check_packed(compiled, made, cuts, mesh))
    for binding in made.plan.bindings:
        if isinstance(binding.site, Projection) and binding.site.weight in cuts:
            for full in binding.names.values():
                parameter = get_attribute(made, full)
                if parameter.requires_grad and split.dimensions[full] is None:
                    parameter.register_hook(_summing(mesh))
    _agree(mesh, lambda: compare(compiled, made, split.mine))
    return made


@dataclass(frozen=True)
class Divided:
    """Which dimension of each tensor that learns is divided over the processes; None where all have the whole."""

    origin: CompiledModule
    mesh: DeviceMesh
    dimensions: Mapping[str, int | None]

    def mine(self, name: str, tensor: Tensor) -> Tensor:
        """This process's part of a whole tensor."""
        return _cut(tensor, self.dimensions[name], self.mesh)

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """The part that this process has, as one of the whole."""
        dimension = self.dimensions[name]
        placement = Replicate() if dimension is None else Shard(dimension)
        return DTensor.from_local(tensor.detach(), self.mesh, [placement], run_check=False)

    @contextmanager
    def gathered(self, model: Any) -> Iterator[tuple[Runtime, bool]]:
        """The model that this one was made of, with what was learnt here."""
        model.watch.refuse_unplanned(model)
        with torch.no_grad():
            for name in self.dimensions:
                part = self.part(name, get_attribute(model, name))
                assert isinstance(part, DTensor)
                get_attribute(self.origin, name).copy_(part.full_tensor())
        with one_writes(self.mesh) as writes:
            yield self.origin, writes


def _cut(tensor: Tensor, dimension: int | None, mesh: DeviceMesh) -> Tensor:
    if dimension is None:
        return tensor
    return tensor.chunk(mesh.size(), dimension)[mesh.get_local_rank()].contiguous()


def _cuts(plan: Plan, ranks: int) -> dict[str, int]:
    """The weights that are divided, and which dimension of each.

    Raises:
        PeftcError: `not-on-parts`, with all that stands in the way.
    """
    cuts: dict[str, int] = {}
    problems: list[Diagnostic] = []
    for site in _projections(plan):
        columns = bool(site.roles & COLUMNS)
        if not columns and not site.roles & ROWS:
            continue
        size = site.n_out if columns else site.n_in
        if not isinstance(site, Linear) or site.batch:
            reason = "of experts each token has its own"
        elif site.is_part:
            reason = f"it is some rows of {site.weight}, whose others are another projection's"
        elif site.tied or site.mixed or len(site.uses) != 1 or site.owner != site.weight:
            reason = "its weight is another layer's too"
        elif size % ranks:
            reason = f"its {size:,} {'outputs' if columns else 'inputs'} are not divided by {ranks}"
        else:
            cuts[site.weight] = int(columns == site.transposed)
            continue
        problems.append(NotOnParts(what=site.name, reason=reason))
    if not cuts and not problems:
        problems.append(NotOnParts(what=plan.sites.model, reason="it has no projection of an attention or an MLP"))
    if problems:
        raise PeftcError(*problems)
    return cuts


def _projections(plan: Plan) -> list[Projection]:
    return [site for site in plan.sites if isinstance(site, Projection)]


def _refuse_trained(plan: Plan, cuts: Mapping[str, int]) -> None:
    """Raises PeftcError `not-on-parts` for what learns between the projections, and is no part itself."""
    within = tuple(f"{weight.rpartition('.')[0].rpartition('.')[0]}." for weight in cuts)
    reason = "each process sees some of the features that it learns from"
    parts = {*cuts, *(s.bias for s in _projections(plan) if s.weight in cuts and s.roles & COLUMNS)}
    names = [name for name in plan.trained if name not in parts and name.startswith(within)]
    if names:
        raise PeftcError(*(NotOnParts(what=name, reason=reason, span=plan.trained[name]) for name in names))


def _smaller(compiled: CompiledModule, cuts: Mapping[str, int], mesh: DeviceMesh) -> nn.Module:
    """The base model with this process's parts of its weights, and what the processes send one another."""
    base, plan = compiled.base, compiled.plan
    linears = {site.weight: site for site in _projections(plan)}
    memo: dict[int, Any] = {}
    for name, parameter in base.named_parameters():
        dimension = cuts.get(name)
        own = plan.captured.frozen(name)
        biased = next((site for site in linears.values() if site.bias == name and site.weight in cuts), None)
        if dimension is not None:
            own = _cut(own, dimension, mesh)
        elif biased is not None and biased.roles & COLUMNS:
            own = _cut(own, 0, mesh)
        elif biased is not None and mesh.get_local_rank():
            own = torch.zeros_like(own)  # the sum over the processes has it once
        elif not parameter.is_meta:
            memo[id(parameter)] = parameter
            continue
        memo[id(parameter)] = nn.Parameter(own, requires_grad=parameter.requires_grad)
    smaller = copy.deepcopy(base, memo)
    group = mesh.get_group().group_name
    latest: list[tuple[Tensor, Tensor]] = []

    def enter(_module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Projections of one value share what is sent."""
        x, *others = given
        if not latest or latest[0][0] is not x:
            latest[:] = [(x, shared(x, group))]
        return latest[0][1], *others

    def leave(_module: nn.Module, _given: Any, y: Tensor) -> Tensor:
        return torch.as_tensor(summed(y, group))

    for weight in cuts:
        module = smaller.get_submodule(weight.rpartition(".")[0])
        if linears[weight].roles & COLUMNS:
            module.register_forward_pre_hook(enter)
        else:
            module.register_forward_hook(leave)
    return smaller


def _planned(base: nn.Module, compiled: CompiledModule, mesh: DeviceMesh) -> Plan:
    """The plan of the same spec on the smaller model.

    Raises:
        PeftcError: `not-on-parts` where the model cannot be captured so, or the spec means something else there.
    """
    whole = compiled.plan
    reason = f"with {mesh.size()} parts its heads or features do not come out"
    try:
        plan = plan_model(base, whole.intentions.common(), whole.captured.example, Timings())
    except PeftcError as error:
        reason = f"{reason} ({error.diagnostics[0].title})"
        raise PeftcError(NotOnParts(what=whole.sites.model, reason=reason)) from error
    if [b.path for b in plan.bindings] != [
        b.path for b in whole.bindings
    ] or plan.trained.keys() != whole.trained.keys():
        raise PeftcError(NotOnParts(what=whole.sites.model, reason="its parts have other sites than the whole"))
    return plan


def _dimensions(whole: Plan, part: Plan) -> dict[str, int | None]:
    """For each tensor that learns the dimension in which the part of it is smaller, if any is."""

    def shape(plan: Plan, name: str) -> tuple[int, ...]:
        spec = plan.tensors.get(name)
        return tuple(get_attribute(plan.captured.module, name).shape) if spec is None else tuple(spec.shape)

    found: dict[str, int | None] = {}
    for name in whole.added:
        pairs = zip(shape(whole, name), shape(part, name), strict=True)
        found[name] = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
    return found


def _check_packed(compiled: CompiledModule, made: CompiledModule, cuts: Mapping[str, int], mesh: DeviceMesh) -> None:
    """Raises PeftcError `not-on-parts` where a part that was packed has other numbers than the whole has there."""
    for weight, item in made.plan.packed.items():
        whole = _cut(frozen_weight(compiled, compiled.plan, weight), cuts.get(weight), mesh)
        if not torch.equal(frozen_weight(made, made.plan, weight), whole):
            reason = f"numbers that {item.storage.name} rounds together, in {weight}, would come to other processes"
            hint = "without double=true, and where parts are whole blocks, they do not"
            raise PeftcError(NotOnParts(what=item.storage.name, reason=reason, hint=hint, span=item.span))


def _summing(mesh: DeviceMesh) -> Callable[[Tensor], Tensor]:
    """Of a tensor that all have whole beside a divided weight each process has a part of the gradient."""

    def total(grad: Tensor) -> Tensor:
        summed = grad.contiguous().clone()
        dist.all_reduce(summed, group=mesh.get_group())
        return summed

    return total


def _agree(mesh: DeviceMesh, work: Callable[[], T]) -> T:
    """What `work` returns, where it does so on all processes; no one goes on where another was refused.

    Raises:
        PeftcError: `work`'s own; `not-on-parts` where that of another process failed.
    """
    failure: Exception | None = None
    try:
        found = work()
    except Exception as error:
        failure = error
    failed = torch.tensor(float(failure is not None), device=mesh.device_type)
    dist.all_reduce(failed, group=mesh.get_group())
    if failure is not None:
        raise failure
    if failed:
        raise PeftcError(NotOnParts(what="the model", reason="another process says why"))
    return found
