"""Methods that share tensors among modules: in HF PEFT those of a shape that one entry of `target_modules` chooses."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Mapping
from typing import Any

from torch import nn

from peftc.planning.plan import Binding


def entry(config: Mapping[str, Any], module: str) -> str:
    """The entry of `target_modules` that chooses a module.

    Raises:
        ValueError: where several do.
    """
    targets = config.get("target_modules")
    if not isinstance(targets, list | set | tuple):
        return str(targets)
    found = [target for target in targets if module.endswith(target)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} entries of its target_modules choose {module}")
    return str(found[0])


def entries(base: nn.Module, bindings: tuple[Binding, ...]) -> str | list[str] | None:
    """`target_modules` by which just those modules share that do here; None if there are no such entries."""
    here: dict[str, Hashable] = {b.site.name: (b.statement, _shape(b)) for b in bindings}
    ends = {name: _end(base, name, here) for name in here}
    for targets in (sorted({*ends.values()}), "|".join(map(re.escape, here))):
        there = {
            b.site.name: (entry({"target_modules": targets}, b.site.name), _shape(b))
            for b in bindings
            if isinstance(targets, str) or sum(map(b.site.name.endswith, targets)) == 1
        }
        if len(there) == len(here) and _parts(here) == _parts(there):
            return targets
    return None


def _end(base: nn.Module, name: str, groups: Mapping[str, Hashable]) -> str:
    """The shortest end of a module's name that means none but modules of its group."""
    parts, names = name.split("."), [each for each, _ in base.named_modules()]
    for start in range(len(parts) - 1, 0, -1):
        end = ".".join(parts[start:])
        if all(groups.get(each) == groups[name] for each in names if each == end or each.endswith(f".{end}")):
            return end
    return name


def _parts(groups: Mapping[str, Hashable]) -> set[frozenset[str]]:
    found: dict[Hashable, set[str]] = defaultdict(set)
    for name, group in groups.items():
        found[group].add(name)
    return {frozenset(names) for names in found.values()}


def _shape(binding: Binding) -> tuple[int, ...]:
    return tuple(getattr(binding.site, side) for side in ("n_out", "n_in"))
