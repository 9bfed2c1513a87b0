"""Frozen weights in the compiled model: as they are, or packed by a storage."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.ir import Provenance, attribute_node, get_attribute, set_tensor, value
from peftc.planning.packed_weight import PackedWeight
from peftc.planning.plan import Plan
from peftc.rewrite.errors import LeavesNoNumbers
from peftc.rewrite.splicer import Splicer

HALFWAY = 2.0**15  # of what float16 has: numbers below it stay finite however a storage rounds them


def frozen_weight(module: nn.Module, plan: Plan, name: str) -> Tensor:
    """The tensor as it is computed with, in the base model's layout: unpacked, where it lies packed."""
    item = plan.packed.get(name)
    if item is None:
        found: Tensor = get_attribute(module, name).detach()
        return found
    if not is_packed(module, item):
        return plan.captured.frozen(name)
    return item.unpack({full: get_attribute(module, full) for full in item.buffers})


def is_packed(module: nn.Module, item: PackedWeight) -> bool:
    """Whether the buffers are in `module`; before they are, the weight is."""
    owner, _, leaf = item.first.rpartition(".")
    try:
        return hasattr(module.get_submodule(owner), leaf)
    except AttributeError:
        return False


def pack_as_found(module: nn.Module, plan: Plan, item: PackedWeight) -> bool:
    """Puts the packed weight into `module` as its checkpoint has it; False where that has it dense or otherwise."""
    state = plan.captured.packed(item.weight)
    buffers = item.packed_as(state) if state is not None else None
    if buffers is None:
        return False
    _put(module, item, buffers)
    return True


def pack(module: nn.Module, item: PackedWeight, weight: Tensor) -> None:
    """Puts the packed weight into `module`; of a dense one that is still there only the shape stays.

    Raises:
        PeftcError: `leaves-no-numbers` where rounding makes a number too large for the precision of the weight.
    """
    buffers = item.pack(weight)
    near = weight.dtype is torch.float16 and HALFWAY < float(weight.abs().amax()) < float("inf")
    if near and not item.unpack(buffers).isfinite().all():
        problem = LeavesNoNumbers(method=item.storage.name, weight=item.weight, dtype="float16", span=item.span)
        raise PeftcError(problem)
    _put(module, item, buffers)


def _put(module: nn.Module, item: PackedWeight, buffers: dict[str, Tensor]) -> None:
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
