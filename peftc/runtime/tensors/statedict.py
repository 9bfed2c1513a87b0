"""A compiled model's state dict: what was added and what learns, not the frozen base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftc.runtime.holder import Holder


def keep_added(module: Holder, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Drops the frozen base from a state dict."""
    added = module.plan.added | module.watch.unplanned(module)
    for name in [name for name in state if name.startswith(prefix) and name.removeprefix(prefix) not in added]:
        del state[name]


def ignore_frozen(module: Holder, incompatible: Any) -> None:
    """A state dict without the frozen base misses nothing; of other modules' names nothing is known here."""
    added = module.plan.added | module.watch.unplanned(module)
    # A tied tensor is missed under each of its names.
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    frozen = {name for name, _ in tensors if name not in added}
    incompatible.missing_keys[:] = [
        name for name in incompatible.missing_keys if not (name in frozen or _ends_with_one_of(name, frozen))
    ]


def prepare_again(module: Holder, _incompatible: Any) -> None:
    """Frozen weights that depend on state, such as what ReLoRA has merged, follow the state that was loaded."""
    module.prepare()


def _ends_with_one_of(name: str, frozen: set[str]) -> bool:
    """Whether `name`, less the path of the module that the compiled one stands in, is a frozen tensor's."""
    parts = name.split(".")
    return any(".".join(parts[start:]) in frozen for start in range(1, len(parts)))


def part_from_base(module: Holder, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before a state dict is loaded: what it would write into the base model's own tensors goes elsewhere."""
    watch = module.watch
    parted = watch.frozen - watch.rewritten - watch.unfrozen
    first = {id(parameter): name for name, parameter in module.named_parameters() if name in parted}
    for alias, parameter in module.named_parameters(remove_duplicate=False):  # a tied one by any of its names
        given, name = state.get(prefix + alias), first.get(id(parameter))
        if given is None or name is None:
            continue
        now = parameter.detach()
        if not now.is_meta and now.shape == given.shape and not torch.equal(now, given.to(now)):
            watch.part(module, name)
