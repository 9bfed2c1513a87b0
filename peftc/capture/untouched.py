"""What a forward writes on its model while it is traced is taken back.

A forward may keep what it has computed: a mask in an attribute, positions in a dict, a count in a tensor. In a trace
that is a fake tensor, or a number of the example's, and the model would go on computing with it.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper, partial
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

# What comes from these is not the model's own: a logger, a lock, the handle of a hook.
FOREIGN = sys.stdlib_module_names - {"__main__"} | {"torch", "numpy", "peftc"}
PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
KINDS = (OrderedDict, dict, list, set, deque)
EMPTY = object()  # what a cell holds that was not assigned yet


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Leaves `model` as it was, whatever the block runs of it, also where that raises.

    That is each module's attributes, hooks and mode, and which its tensors and submodules are; what lists, dicts, sets
    and its own objects, such as a config, hold at any depth; the numbers of tensors that are neither parameters nor
    buffers; what its hooks, methods and the functions beside them keep in closures and caches; what is set on its
    classes. Everything is the object again that it was.
    """
    steps = _Walk(model).steps
    try:
        yield
    finally:
        for step in steps:
            step()


def watched(thing: Any) -> Callable[[], bool]:
    """What tells whether anything that `thing` holds, at any depth, has changed since; of tensors no numbers."""
    before = [(one, _state(one)) for one in _Walk(thing).seen.values()]

    def changed() -> bool:
        return any(not _are_same(_state(one), state) for one, state in before)

    return changed


def _state(thing: Any) -> list[Any]:
    match thing:
        case dict():
            return [*thing.keys(), *thing.values()]
        case list() | set() | deque():
            return [*thing]
        case CellType():
            return [held_in(thing)]
        case type():
            return [held for held in vars(thing).values() if not callable(held)] if is_own(thing) else []
    slots = slots_of(type(thing)) if is_own(type(thing)) else ()
    return [getattr(thing, name, EMPTY) for name in slots]


def _are_same(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(one is other for one, other in zip(now, before, strict=True))


class _Walk:
    """Over all that can be reached from a model: `steps` that each put one thing back if it is another then."""

    def __init__(self, model: nn.Module) -> None:
        self.steps: list[Callable[[], None]] = []
        self.seen: dict[int, Any] = {}  # the things themselves, as the id of one that is gone may be another's
        waiting: list[Any] = [model]
        while waiting:
            thing = waiting.pop()
            if type(thing) not in PLAIN and id(thing) not in self.seen:
                self.seen[id(thing)] = thing
                waiting += self._look(thing)

    def _look(self, thing: Any) -> Iterable[Any]:
        """Remembers what `thing` holds, and returns it."""
        match thing:
            case Tensor():
                return self._numbers(thing)
            case dict() | list() | set() | deque():
                return self._contents(thing)
            case tuple() | frozenset():
                return thing
            case FunctionType():
                return _used_by(thing) if is_own(thing) else ()
            case CellType():
                return self._cell(thing)
            case MethodType():
                return thing.__self__, thing.__func__
            case staticmethod() | classmethod():
                return (thing.__func__,)
            case property():
                return (thing.fget,)
            case partial():
                return thing.func, thing.args, thing.keywords
            case _lru_cache_wrapper():
                self.steps.append(partial(_forget, thing, thing.cache_info().misses))
                return (thing.__wrapped__,)
            case type():
                return self._class(thing) if is_own(thing) else ()
        if isinstance(thing, nn.Module):
            return self._module(thing)
        if isinstance(thing, SimpleNamespace) or is_own(type(thing)):
            return self._object(thing)
        return ()

    def _contents(self, held: Any) -> Iterable[Any]:
        before = _entries(held)
        self.steps.append(partial(_refill, held, before))
        return [value for _, value in before] if isinstance(held, dict) else before

    def _module(self, module: nn.Module) -> Iterable[Any]:
        """torch.export puts fake tensors in the place of parameters and buffers, so that none is written on itself."""
        for tensors in (module._parameters, module._buffers):
            self.seen[id(tensors)] = tensors
            self._contents(tensors)
        return self._object(module)

    def _object(self, thing: Any) -> Iterable[Any]:
        found = {name: getattr(thing, name) for name in slots_of(type(thing)) if hasattr(thing, name)}
        self.steps.extend(partial(_set, thing, name, value) for name, value in found.items())
        return getattr(thing, "__dict__", {}), found, type(thing)

    def _class(self, cls: type) -> Iterable[Any]:
        before = dict(vars(cls))
        self.steps.append(partial(_reset, cls, before))
        return *before.values(), *cls.__bases__

    def _cell(self, cell: CellType) -> Iterable[Any]:
        held = held_in(cell)
        self.steps.append(partial(_fill, cell, held))
        return () if held is EMPTY else (held,)

    def _numbers(self, tensor: Tensor) -> Iterable[Any]:
        """Those of a plain tensor: it is a constant to torch.export, which the first write of a trace reaches."""
        if type(tensor) is Tensor and tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_inference()):
            self.steps.append(partial(_rewrite, tensor, tensor.detach().clone(), tensor._version))
        return ()


def is_own(thing: Any) -> bool:
    """Whether a class or a function is of the model's code, or of what that is built on short of torch."""
    return str(thing.__module__).partition(".")[0] not in FOREIGN


def slots_of(kind: type) -> set[str]:
    """The attributes of a class's objects that are in no `__dict__`."""
    held = [vars(cls).get("__slots__", ()) for cls in kind.__mro__]
    return {name for names in held for name in ((names,) if isinstance(names, str) else names)}


def _used_by(function: FunctionType) -> Iterable[Any]:
    """What a function keeps: in its closure, its defaults, on itself; and in what is beside it in the same file."""
    for thing in map(function.__globals__.get, function.__code__.co_names):
        called = isinstance(thing, FunctionType | _lru_cache_wrapper) and thing.__module__ == function.__module__
        if called or isinstance(thing, dict | list | set | deque):
            yield thing
    yield from function.__closure__ or ()
    yield from (function.__defaults__, function.__kwdefaults__, vars(function))


def _kind(held: Any) -> Any:
    """Whose methods hold and do no more, as those of a class of its own may: look a thing up that is not there yet."""
    return type(held) if type(held) in KINDS else next(kind for kind in KINDS if isinstance(held, kind))


def _entries(held: Any) -> list[Any]:
    kind = _kind(held)
    return list((kind.items if issubclass(kind, dict) else kind.__iter__)(held))


def _refill(held: Any, before: list[Any]) -> None:
    now, kind = _entries(held), _kind(held)
    if len(now) == len(before) and all(map(_is_same, now, before)):
        return
    kind.clear(held)
    (kind.extend if kind in (list, deque) else kind.update)(held, before)


def _is_same(one: Any, other: Any) -> bool:
    """Of two entries; of a dict's, which are pairs made for the occasion, key and value."""
    pair = type(one) is type(other) is tuple and len(one) == len(other) == 2
    return one is other or (pair and one[0] is other[0] and one[1] is other[1])


def _set(thing: Any, name: str, before: Any) -> None:
    if getattr(thing, name, EMPTY) is not before:
        object.__setattr__(thing, name, before)


def _reset(cls: type, before: dict[str, Any]) -> None:
    """What a class holds but is no part of how it works."""
    now = dict(vars(cls))
    for name in now.keys() | before.keys():
        old, new = before.get(name, EMPTY), now.get(name, EMPTY)
        if old is new or callable(old) or callable(new):
            continue
        if old is EMPTY:
            delattr(cls, name)
        else:
            setattr(cls, name, old)


def held_in(cell: CellType) -> Any:
    """What a cell holds, or EMPTY."""
    try:
        return cell.cell_contents
    except ValueError:
        return EMPTY


def _fill(cell: CellType, before: Any) -> None:
    if held_in(cell) is before:
        return
    if before is EMPTY:
        del cell.cell_contents
    else:
        cell.cell_contents = before


def _forget(cached: _lru_cache_wrapper[Any], misses: int) -> None:
    if cached.cache_info().misses != misses:
        cached.cache_clear()


def _rewrite(tensor: Tensor, before: Tensor, version: int) -> None:
    if tensor._version != version:
        with torch.no_grad():
            tensor.copy_(before)
