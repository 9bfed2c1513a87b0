"""Which blocks of a model are equal, so that a trace of one is a trace of all.

Equal are blocks of one class that hold the same things all the way down: submodules of the same classes, tensors of the
same sizes, and attributes that are equal, or are one object. Numbers that count blocks off (`layer_idx`) are not
equal; whether a forward looks at them shows when it runs, with `Watched` in their place.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
APART = {"_parameters", "_buffers", "_modules"}  # what a module's `__dict__` has that is looked at by its own rules
Place = tuple[str, str]  # a module's path in its block, and the name of an attribute


@dataclass(frozen=True)
class Group:
    """Equal blocks, by their paths in the model; `counting` are the numbers in which each differs from the others."""

    paths: tuple[str, ...]
    counting: tuple[Place, ...]


def groups_of(model: nn.Module) -> list[Group]:
    """The groups of equal blocks of a model that do not lie in one another."""
    holders = Counter(id(tensor) for module in model.modules() for tensor in _own_tensors(module).values())
    found: list[Group] = []
    for path, container in model.named_modules():
        inside = any(path == block or path.startswith(f"{block}.") for group in found for block in group.paths)
        if not isinstance(container, nn.ModuleList | nn.Sequential) or inside:
            continue
        blocks = {f"{path}.{name}" if path else name: block for name, block in container.named_children()}
        found += _grouped({at: block for at, block in blocks.items() if next(block.children(), None)}, holders)
    return found


def _grouped(blocks: dict[str, nn.Module], holders: Counter[int]) -> Iterator[Group]:
    alike: dict[Any, list[str]] = defaultdict(list)
    numbers: dict[str, dict[Place, int]] = {}
    for path, block in blocks.items():
        looks, numbers[path] = looks_of(block, holders)
        alike[looks].append(path)
    for paths in alike.values():
        seen = {place: [numbers[path][place] for path in paths] for place in numbers[paths[0]]}
        counting = tuple(place for place, values in seen.items() if len({*values}) == len(values) > 1)
        settled: dict[Any, list[str]] = defaultdict(list)
        for path in paths:
            settled[tuple(numbers[path][place] for place in seen if place not in counting)].append(path)
        yield from (Group(tuple(same), counting) for same in settled.values() if len(same) > 1)


def looks_of(block: nn.Module, holders: Counter[int] | None = None) -> tuple[Any, dict[Place, int]]:
    """All that a block holds, to be compared with another's, without the numbers among its attributes; and these.

    `holders`: in how many places of the model each tensor is; without it each is taken for the block's alone.
    """
    return _Look(block, holders or Counter()).found()


class _Look:
    """At one block."""

    def __init__(self, block: nn.Module, holders: Counter[int]) -> None:
        self.block, self.holders = block, holders
        self.inside = {id(module): path for path, module in block.named_modules(remove_duplicate=False)}
        self.tensors: dict[int, int] = {}
        self.within = Counter(id(t) for module in block.modules() for t in _own_tensors(module).values())

    def found(self) -> tuple[Any, dict[Place, int]]:
        parts: list[Any] = []
        numbers: dict[Place, int] = {}
        for path, module in self.block.named_modules(remove_duplicate=False):
            parts += (path, type(module), self.inside[id(module)])
            parts += ((name, self._tensor(tensor)) for name, tensor in _own_tensors(module).items())
            parts += (tuple(module._parameters), tuple(module._buffers), tuple(module._modules))
            for name, value in vars(module).items():
                if type(value) is int:
                    numbers[path, name] = value
                if name not in APART:
                    parts.append((name, int if type(value) is int else self._thing(value)))
        return tuple(parts), numbers

    def _tensor(self, tensor: torch.Tensor) -> Any:
        """Its sizes, and which of the block's own it is; itself, where it is not the block's alone."""
        if self.holders[id(tensor)] > self.within[id(tensor)]:
            return id(tensor)
        place = self.tensors.setdefault(id(tensor), len(self.tensors))
        lies = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset()) if tensor.layout is torch.strided else ()
        return type(tensor), *lies, tensor.dtype, tensor.device, tensor.requires_grad, place

    def _thing(self, thing: Any) -> Any:
        if type(thing) in PLAIN:
            return type(thing), thing
        if type(thing) in (tuple, list):
            return type(thing), *map(self._thing, thing)
        if type(thing) in (set, frozenset):
            return type(thing), frozenset(map(self._thing, thing))
        if isinstance(thing, dict):
            return type(thing), *((self._thing(key), self._thing(value)) for key, value in thing.items())
        if isinstance(thing, MethodType):
            return MethodType, id(thing.__func__), self._thing(thing.__self__)
        if isinstance(thing, partial):
            return partial, self._thing(thing.func), self._thing(thing.args), self._thing(thing.keywords)
        if id(thing) in self.inside:
            return nn.Module, self.inside[id(thing)]
        return id(thing)


def _own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's own parameters and buffers, without those of its submodules."""
    held = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


class Watched:
    """Stands for a number, and does what that does; `used` is told when anything is done with it."""

    def __init__(self, number: int, used: list[None]) -> None:
        self._number, self._used = number, used

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What `isinstance` asks."""
        self._used.append(None)
        return int


def _passed_on(name: str) -> Any:
    def method(self: Watched, *args: Any) -> Any:
        self._used.append(None)
        return getattr(self._number, name)(*args)

    return method


for _name in {*dir(int)} - {*dir(object)} | {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__",
                                             "__repr__", "__str__", "__format__"}:  # fmt: skip
    setattr(Watched, _name, _passed_on(_name))
