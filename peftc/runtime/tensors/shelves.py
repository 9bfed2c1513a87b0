"""The modules under a compiled model: shelves that hold its tensors, always in the same order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from peftc.diagnostics.diagnostic import PeftcError
from peftc.runtime.errors import NeverCalled


class Shelf(nn.Module):
    """What is left of a module that is part of a graph now: its tensors. A hook on it would never run."""

    peftc_path: str  # called as no part of a model is, which it would hide
    peftc_blocks: str

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise PeftcError(NeverCalled(path=self.peftc_path, blocks=self.peftc_blocks))

    forward = _refuse
    register_forward_hook = _refuse
    register_forward_pre_hook = _refuse
    register_full_backward_hook = _refuse
    register_full_backward_pre_hook = _refuse
    register_backward_hook = _refuse


def arrange(root: nn.Module, names: Iterable[str]) -> None:
    """Makes plain modules shelves, and puts all that they hold in the order of `names`, full names of tensors.

    So an optimiser's state goes from one model to another, whichever of its tensors a graph happened to read first.
    """
    rank: dict[str, int] = {}
    for place, name in enumerate(names):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            rank.setdefault(".".join(parts[:end]), place)
    graphs = [path for path, module in root.named_modules() if path and isinstance(module, fx.GraphModule)]
    for path, module in root.named_modules(remove_duplicate=False):
        if type(module) is nn.Module:
            module.__class__ = Shelf
            module.__dict__.update(peftc_path=path, peftc_blocks=", ".join(graphs[:2]))
        prefix = f"{path}." if path else ""
        for held in (module._modules, module._parameters, module._buffers):
            items = sorted(held.items(), key=lambda item: rank.get(f"{prefix}{item[0]}", len(rank)))
            held.clear()
            held.update(items)
