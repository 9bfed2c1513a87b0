"""A compiled model on another device. Its precision stays: the graph's casts were made for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.ir import get_attribute, set_tensor
from peftc.runtime.holder import Holder
from peftc.runtime.tensors.unfrozen import precision


def refuse_casts(module: Holder, change: Callable[[Tensor], Tensor]) -> None:
    """Raises PeftcError `fixed-precision` where `change`, of `nn.Module._apply`, would cast a parameter or its like.

    It is asked about empty tensors: nothing is changed yet.
    """
    packed = {full for item in module.plan.packed.values() for full in item.buffers}
    asked: dict[tuple[torch.dtype, torch.device], torch.dtype] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        key = tensor.dtype, tensor.device
        if name in packed or not tensor.is_floating_point() or tensor.is_meta:
            continue
        if key not in asked:
            with torch.no_grad():
                asked[key] = change(torch.empty(0, dtype=key[0], device=key[1])).dtype
        if asked[key] != tensor.dtype:
            raise PeftcError(precision(name, tensor.dtype, asked[key]))


def keep_packed(module: Holder, before: dict[str, Tensor]) -> None:
    """Packed numbers keep their precision: to round their scales would be to change every weight."""
    for full, tensor in before.items():
        if get_attribute(module, full).dtype != tensor.dtype:
            set_tensor(module, full, tensor.to(get_attribute(module, full).device))


def move_constants(module: fx.GraphModule, before: torch.device, after: torch.device) -> None:
    """A graph names the device of the tensors it makes."""
    for node in module.graph.nodes:
        swapped = fx.node.map_aggregate(
            (node.args, node.kwargs),
            lambda item: after if isinstance(item, torch.device) and item == before else item,
        )
        node.args, node.kwargs = cast(Any, swapped)
    module.recompile()
