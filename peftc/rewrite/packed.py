"""Frozen weights in the compiled model: as they are, or packed by a storage."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.ir import Provenance, attribute_node, fake_mode, get_attribute, set_tensor, value
from peftc.planning.packed_weight import PackedWeight
from peftc.planning.plan import Plan
from peftc.rewrite.errors import LeavesNoNumbers
from peftc.rewrite.splicer import Splicer

HALFWAY = 2.0**15  # of what float16 has: numbers below it stay finite however a storage rounds them


def frozen_weight(module: nn.Module, plan: Plan, name: str) -> Tensor:
    """The tensor as it is computed with, in the base model's layout: unpacked, where it lies packed.

    One that is left in its checkpoint is read now, and is the caller's to let go of.
    """
    item = plan.packed.get(name)
    if item is None:
        found: Tensor = get_attribute(module, name).detach()
        return plan.captured.frozen(name) if is_unread(found) else found
    if not is_packed(module, item):
        return plan.captured.frozen(name)
    if is_unread(get_attribute(module, item.first)):
        return item.unpack(packed_now(plan, item, plan.captured.frozen(name)))
    return item.unpack({full: get_attribute(module, full) for full in item.buffers})


def is_unread(tensor: Tensor) -> bool:
    """Whether it only stands for one that is still in a checkpoint."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def is_packed(module: nn.Module, item: PackedWeight) -> bool:
    """Whether the buffers are in `module`; before they are, the weight is."""
    owner, _, leaf = item.first.rpartition(".")
    try:
        return hasattr(module.get_submodule(owner), leaf)
    except AttributeError:
        return False


def packed_now(plan: Plan, item: PackedWeight, weight: Tensor) -> dict[str, Tensor]:
    """The buffers, by full name, of the base's `weight`: as its checkpoint has them, where that has it packed so.

    Raises:
        PeftcError: as `pack`.
    """
    state = plan.captured.packed(item.weight)
    buffers = item.packed_as(state) if state is not None else None
    return _rounded(item, weight) if buffers is None else buffers


def leave_packed(module: fx.GraphModule, item: PackedWeight) -> None:
    """Puts what stands for the buffers into `module`: they are made when they are parted."""
    with fake_mode(module.graph):
        buffers = {
            full: torch.empty(buffer.shape, dtype=buffer.dtype, device=get_attribute(module, item.weight).device)
            for full, buffer in item.buffers.items()
        }
    put_packed(module, item, buffers)


def pack(module: nn.Module, item: PackedWeight, weight: Tensor) -> None:
    """Puts the packed weight into `module`; of a dense one that is still there only the shape stays.

    Raises:
        PeftcError: `leaves-no-numbers` where rounding makes a number too large for the precision of the weight.
    """
    put_packed(module, item, _rounded(item, weight))


def _rounded(item: PackedWeight, weight: Tensor) -> dict[str, Tensor]:
    buffers = item.pack(weight)
    near = weight.dtype is torch.float16 and HALFWAY < float(weight.abs().amax()) < float("inf")
    if near and not item.unpack(buffers).isfinite().all():
        problem = LeavesNoNumbers(method=item.storage.name, weight=item.weight, dtype="float16", span=item.span)
        raise PeftcError(problem)
    return buffers


def put_packed(module: nn.Module, item: PackedWeight, buffers: dict[str, Tensor]) -> None:
    """Puts buffers in place; of a dense weight that is still there only the shape stays."""
    for full, tensor in buffers.items():
        set_tensor(module, full, tensor)
    owner, _, leaf = item.weight.rpartition(".")
    dense = module.get_submodule(owner)._parameters.get(leaf)
    if dense is not None:
        set_tensor(module, item.weight, nn.Parameter(dense.detach().to("meta"), requires_grad=False))


def unpack_in_graph(splicer: Splicer, plan: Plan, pass_name: str) -> dict[str, fx.Node]:
    """Replaces each packed weight in the graph by what unpacks it, where it is first read.

    Returns that node by the weight's name.
    """
    module = splicer.module
    dense: dict[str, fx.Node] = {}
    for item in plan.packed.values():
        (node,) = module.graph.find_nodes(op="get_attr", target=item.weight)
        first = min(node.users)
        operands = [attribute_node(module.graph, module, full) for full in item.names.values()]
        facts = repr(item.storage), item.shape, item.dtype, item.transposed
        template = splicer.templates.get(_unpacking(item), facts, [value(operand) for operand in operands])
        stamp = Provenance(pass_name, item.weight, item.span)
        dense[item.weight], _ = splicer.splice(template, operands, first.prev, stamp, inside=first)
        node.replace_all_uses_with(dense[item.weight])
        module.graph.erase_node(node)
        owner, _, leaf = item.weight.rpartition(".")
        del module.get_submodule(owner)._parameters[leaf]
    return dense


def _unpacking(item: PackedWeight) -> Callable[..., Tensor]:
    return lambda *buffers: item.unpack(dict(zip(item.names.values(), buffers, strict=True)))
