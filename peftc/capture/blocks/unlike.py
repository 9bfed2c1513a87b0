"""Whether two blocks are the same in all that their code can reach, but for plain attributes that it never reads.

Blocks of a model mostly differ in one number, which of them they are; what is read of such an attribute is seen while
one of them runs. Two blocks that differ in nothing else do the same, without the other one being run.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import repeat
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.exporters.utils import patch_attributes

from peftc.capture.untouched import EMPTY, held_in, is_own, slots_of

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
Place = tuple[str, str]  # the path of a module within the block, and the name of an attribute


def unlike(block: nn.Module, other: nn.Module, own: Any, others: Any) -> frozenset[Place] | None:
    """Where two blocks, whose tensors are of the same sizes, hold different plain things; `own`: what runs them.

    Returns:
        None where they are unlike in anything else, or in what cannot be compared.
    """
    pairs = _Pairs()
    return frozenset(pairs.places) if pairs.are_alike(block, other, own, others) else None


@contextmanager
def reading(block: nn.Module, places: frozenset[Place]) -> Iterator[set[Place]]:
    """While it is open, which of these attributes of `block` are read: they are found where torch looks last."""
    read: set[Place] = set()
    taken: dict[tuple[int, str], tuple[Place, Any]] = {}

    def looked_up(own: Any, module: nn.Module, name: str) -> Any:
        if (found := taken.get((id(vars(module)), name))) is None:
            return own(module, name)
        read.add(found[0])
        return found[1]

    with ExitStack() as stack:
        modules = dict(block.named_modules(remove_duplicate=False))
        for place in places:
            path, name = place
            module = modules.get(path)
            if module is None or name not in vars(module) or _may_find(module, name):
                read.add(place)  # for all that can be told
                continue
            held: dict[str, Any] = module.__dict__
            taken[id(held), name] = place, held[name]
            stack.callback(_refill, held, dict(held), name, partial(read.add, place))
            del held[name]
        stack.enter_context(patch_attributes([(nn.Module, "__getattr__", lambda own: _method(looked_up, own))]))
        yield read


def _method(looked_up: Any, own: Any) -> Any:
    return lambda module, name: looked_up(own, module, name)


def _may_find(module: nn.Module, name: str) -> bool:
    """Whether an attribute that is taken out may be found elsewhere than where torch looks last."""
    classes = type(module).__mro__
    own = {way for cls in classes[: classes.index(nn.Module)] for way in vars(cls)}
    return hasattr(type(module), name) or not own.isdisjoint(("__getattr__", "__getattribute__"))


def _refill(held: dict[str, Any], before: dict[str, Any], name: str, was_set: Callable[[], None]) -> None:
    """Puts an attribute back in its place among the others, or leaves what was set meanwhile."""
    if name in held:
        was_set()
    now = {one: value for one, value in before.items() if one == name or one in held} | held
    held.clear()
    held.update(now)


class _Pairs:
    """Two things side by side, and what they hold: each of the one stands for one of the other, always the same."""

    def __init__(self) -> None:
        self.places: set[Place] = set()
        self._there: dict[int, Any] = {}
        self._here: dict[int, Any] = {}
        self._waiting: list[tuple[Any, Any, str | None, Place | None]] = []

    def are_alike(self, block: nn.Module, other: nn.Module, own: Any, others: Any) -> bool:
        """Whether they differ in `places` alone."""
        self._waiting = [(own, others, None, None), (block, other, "", None)]
        while self._waiting:
            if not self._same(*self._waiting.pop()):
                return False
        return True

    def _same(self, one: Any, other: Any, path: str | None, place: Place | None) -> bool:
        """`path`: where a module stands in the block. `place`: of which attribute it is."""
        if one is other:
            return True
        if type(one) is not type(other):
            return self._differ(place) if type(one) in PLAIN and type(other) in PLAIN else False
        if type(one) in PLAIN:
            return (one == other and str(one) == str(other)) or self._differ(place)  # 0.0 is not -0.0
        if id(one) in self._there or id(other) in self._here:
            return self._there.get(id(one)) is other and self._here.get(id(other)) is one
        self._there[id(one)], self._here[id(other)] = other, one
        return self._hold_the_same(one, other, path)

    def _differ(self, place: Place | None) -> bool:
        if place is not None:
            self.places.add(place)
        return place is not None

    def _hold_the_same(self, one: Any, other: Any, path: str | None) -> bool:
        if isinstance(one, nn.Module):
            return self._modules(one, other, path)
        kind = type(one)
        if kind in (dict, OrderedDict):
            return list(one) == list(other) and self._then(one.values(), other.values())
        if kind in (list, tuple, deque):
            return len(one) == len(other) and self._then(one, other)
        if kind in (set, frozenset):
            return all(type(entry) in PLAIN for entry in one) and bool(one == other)
        if kind is FunctionType:
            return one.__code__ is other.__code__ and self._then(_of_function(one), _of_function(other))
        if kind is MethodType:
            return self._then([one.__func__, one.__self__], [other.__func__, other.__self__])
        if kind is partial:
            return self._then([one.func, one.args, one.keywords], [other.func, other.args, other.keywords])
        if kind is CellType:
            return self._then([held_in(one)], [held_in(other)])
        if kind is SimpleNamespace or all(is_own(cls) for cls in kind.__mro__[:-1]):
            return self._then(_of_object(one), _of_object(other))
        return False

    def _then(self, ones: Iterable[Any], others: Iterable[Any]) -> bool:
        self._waiting += [(one, other, None, None) for one, other in zip(ones, others, strict=True)]
        return True

    def _modules(self, one: nn.Module, other: nn.Module, path: str | None) -> bool:
        """Modules by their attributes. What tensors those of the block itself have was compared before."""
        mine, theirs = vars(one), vars(other)
        if mine.keys() != theirs.keys() or slots_of(type(one)):
            return False
        for name, value in mine.items():
            its = theirs[name]
            if path is None or name not in ("_parameters", "_buffers", "_modules", "forward"):
                self._waiting.append((value, its, None, None if path is None else (path, name)))
            elif name == "forward":
                if path:  # the block's own is `own`, or what captures it
                    self._waiting.append((value, its, None, None))
            elif [*value] != [*its]:
                return False
            elif name == "_modules":
                inside = [f"{path}.{child}" if path else child for child in value]
                self._waiting += zip(value.values(), its.values(), inside, repeat(None))
        return True


def _of_function(function: FunctionType) -> list[Any]:
    return [function.__globals__, function.__closure__, function.__defaults__, function.__kwdefaults__, vars(function)]


def _of_object(thing: Any) -> list[Any]:
    return [getattr(thing, "__dict__", None), *(getattr(thing, name, EMPTY) for name in sorted(slots_of(type(thing))))]
