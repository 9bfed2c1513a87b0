"""Equal blocks are traced once: for the others, a model calls an operation that stands for them.

The whole of the model runs while it is captured, but for the insides of blocks that are equal to one that ran, called
with equal arguments: tensors of the same sizes, in symbols, and other things that are the same. In the graph there is
for each of these one node, with the block's tensors for its operands, and around the one that ran there are two marks.
`repeat` writes what is between the marks in the place of each such node.

Nothing is guessed. A block's own code is run before (`alike.deeds`), without being traced, and has to do the same; once
one did, it is enough of others that they have the same code and all that it can reach is the same, or not read.
`NotAlikeError` says that a block changes more than what it returns; then the model is captured without this.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from transformers.exporters.utils import patch_attributes

from peftc.capture.blocks.alike import Deeds, deeds, groups_of, own_tensors, sizes_of
from peftc.capture.blocks.unlike import PLAIN, Place, reading, unlike
from peftc.capture.untouched import watched
from peftc.graph.repeat import BEGIN, END, STANDS, NotAlikeError

NONE = object()


@dataclass(frozen=True)
class _Given:
    """The arguments of a call, or what it returned: tensors, each once, and how they stand among other things."""

    tensors: list[Tensor]
    places: tuple[int | None, ...]
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, things: Any, known: Sequence[Tensor] = ()) -> _Given | None:
        """None where there is something among them that may be anything. Those of `known` come first."""
        leaves, spec = pytree.tree_flatten(things)
        tensors = list(known)
        places: list[int | None] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                at = next((at for at, tensor in enumerate(tensors) if tensor is leaf), len(tensors))
                tensors[at:] = tensors[at:] or [leaf]
                places.append(at)
            elif type(leaf) in PLAIN:
                places.append(None)
            else:
                return None
        others = tuple(NONE if place is not None else leaf for leaf, place in zip(leaves, places, strict=True))
        return cls(tensors, tuple(places), others, spec)

    def looks(self) -> Any:
        """What is equal of equal calls; None where the tensors are not like those of any other."""
        if not all(_is_usual(tensor) for tensor in self.tensors):
            return None
        memories = [tensor.untyped_storage()._cdata for tensor in self.tensors]
        return (
            str(self.spec), self.places, tuple((type(leaf), leaf) for leaf in self.leaves),
            tuple(memories.index(one) for one in memories), tuple(map(sizes_of, self.tensors)),
        )  # fmt: skip

    def is_same(self, other: _Given | None) -> bool:
        """Whether it is what it was: a block may have put something else into a list that it was given."""
        if other is None or (other.places, other.leaves, other.spec) != (self.places, self.leaves, self.spec):
            return False
        return all(one is now for one, now in zip(self.tensors, other.tensors, strict=True))

    def with_tensors(self, tensors: Sequence[Tensor]) -> Any:
        """The same things with others for the tensors."""
        pairs = zip(self.leaves, self.places, strict=True)
        return pytree.tree_unflatten([leaf if at is None else tensors[at] for leaf, at in pairs], self.spec)


def _is_usual(tensor: Tensor) -> bool:
    """Whether all that a trace can know of it are its sizes."""
    fake = isinstance(tensor, FakeTensor | nn.Parameter)
    return fake and tensor.layout is torch.strided and getattr(tensor, "constant", None) is None


@dataclass
class _Kind:
    """A block that was traced, for those that are equal to it.

    `done`, `result`   what it does and returned
    `places`           in which attributes its group's blocks differ
    `changed`          whether anything that it can reach has changed since
    `confirmed`        whether another block's own code was run, and did the same
    """

    number: int
    block: nn.Module
    own: Callable[..., Any]
    done: Deeds
    result: _Given
    places: frozenset[Place]
    changed: Callable[[], bool]
    confirmed: bool = False
    _unread: frozenset[Place] | None = None

    def is_like(self, block: nn.Module, own: Callable[..., Any], given: _Given) -> bool:
        """Whether another block does the same, as it can reach the same, but for what this one did not read."""
        if not self.confirmed or any(id(tensor) in _ids(block) for tensor in given.tensors):
            return False
        if self._unread is None:
            self._unread = self._not_read(given)
        places = None if self.changed() else unlike(self.block, block, self.own, own)
        return places is not None and places <= self._unread

    def _not_read(self, given: _Given) -> frozenset[Place]:
        """Without which it does the same: it runs again, and they are not where they are looked for first."""
        with reading(self.block, self.places) as read:
            again = _done(self.block, self.own, given)
        return self.places - read if again is not None and again.lines == self.done.lines else frozenset()

    def stands_for(self, path: str, given: _Given) -> Any:
        """What the other block returns: a node of the graph stands for it."""
        like = self.result.tensors[len(given.tensors) :]
        return self.result.with_tensors([*given.tensors, *STANDS(self.number, path, given.tensors, like)])


@dataclass
class _Once:
    """A capture in which equal blocks are traced once. `_ran`: of equal calls, each kind of block that was traced.

    `blocks`: each group's, and their own ways.
    """

    blocks: list[list[tuple[nn.Module, Callable[..., Any]]]] = field(default_factory=list)
    _ran: dict[Any, list[_Kind]] = field(default_factory=lambda: defaultdict(list))
    _called: set[str] = field(default_factory=set)
    _kinds: Iterator[int] = field(default_factory=count)
    _places: dict[int, frozenset[Place]] = field(default_factory=dict)

    def instead_of(self, group: int, path: str, block: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = _Given.of((args, kwargs))
            again = path in self._called
            self._called.add(path)
            if given is None or again or given.looks() is None:
                return own(*args, **kwargs)
            alike = self._ran[self._key(group, given)]
            if (kind := next((kind for kind in alike if kind.is_like(block, own, given)), None)) is not None:
                return kind.stands_for(path, given)
            changed, done = watched((block, own)), _done(block, own, given)
            if changed():
                raise NotAlikeError(f"{type(block).__name__} leaves something behind")
            if done is None:
                return own(*args, **kwargs)
            if (kind := next((kind for kind in alike if kind.done.lines == done.lines), None)) is not None:
                kind.confirmed = True
                return kind.stands_for(path, given)
            number = next(self._kinds)
            BEGIN(number, path, given.tensors)
            found = own(*args, **kwargs)
            returned = _Given.of(found, given.tensors)
            END(number, [] if returned is None else returned.tensors[len(given.tensors) :])
            if returned is not None and given.is_same(_Given.of((args, kwargs))) and _is_new(returned, given):
                # What it asked may have made two sizes one: the next block is given them so.
                kind = _Kind(number, block, own, done, returned, self._places_of(group), changed)
                self._ran[self._key(group, given)].append(kind)
            return found

        return forward

    def _places_of(self, group: int) -> frozenset[Place]:
        """In which plain attributes a group's blocks differ."""
        if group not in self._places:
            (first, own), *others = self.blocks[group]
            found = [unlike(first, block, own, its) or () for block, its in others]
            self._places[group] = frozenset(chain.from_iterable(found))
        return self._places[group]

    @staticmethod
    def _key(group: int, given: _Given) -> Any:
        autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        return group, given.looks(), torch.is_grad_enabled(), autocast


def _ids(block: nn.Module) -> set[int]:
    """Of a block's own tensors."""
    return {id(tensor) for module in block.modules() for tensor in own_tensors(module).values()}


def _done(block: nn.Module, own: Callable[..., Any], given: _Given) -> Deeds | None:
    """What the block does; None where that cannot be told, or what it is given is what it has or finds elsewhere."""

    def call(tensors: Sequence[Tensor]) -> Any:
        args, kwargs = given.with_tensors(tensors)
        return own(*args, **kwargs)

    if (done := deeds(block, given.tensors, call)) is None:
        return None
    theirs = _ids(block) | {*done.others}
    return None if any(id(tensor) in theirs for tensor in given.tensors) else done


@contextmanager
def tracing_once(model: nn.Module) -> Iterator[None]:
    """While it is open, of equal blocks of `model` that are called with equal arguments one is traced."""
    once, patches = _Once(), []
    for group, paths in enumerate(groups_of(model)):
        blocks = [(block, block.forward) for block in map(model.get_submodule, paths)]
        once.blocks.append(blocks)
        for path, (block, own) in zip(paths, blocks, strict=True):
            instead = once.instead_of(group, path, block, own)
            patches.append((block, "forward", lambda _own, instead=instead: instead))
    with patch_attributes(patches):
        yield


@contextmanager
def running_once(model: nn.Module) -> Iterator[None]:
    """While it is open, of blocks that look alike and are called with equal arguments one runs, for all.

    For a model that is asked what it takes, on tensors without numbers. Here equality is taken for granted, which the
    trace that follows does not.
    """
    done: dict[Any, tuple[int, _Given]] = {}

    def instead_of(group: int, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = _Given.of((args, kwargs))
            key = (group, looks) if given is not None and (looks := given.looks()) is not None else None
            if given is None or key is None:
                return own(*args, **kwargs)
            if key in done:
                many, result = done[key]
                return result.with_tensors([*given.tensors, *result.tensors[many:]])
            found = own(*args, **kwargs)
            returned = _Given.of(found, given.tensors)
            if returned is not None and given.is_same(_Given.of((args, kwargs))):
                done[key] = len(given.tensors), returned
            return found

        return forward

    patches = []
    for group, paths in enumerate(groups_of(model)):
        for block in map(model.get_submodule, paths):
            instead = instead_of(group, block.forward)
            patches.append((block, "forward", lambda _own, instead=instead: instead))
    with patch_attributes(patches):
        yield


def _is_new(returned: _Given, given: _Given) -> bool:
    """Whether each tensor that a block made is one of sizes, in memory of its own."""
    made = returned.tensors[len(given.tensors) :]
    memories = [tensor.untyped_storage()._cdata for tensor in made]
    taken = {tensor.untyped_storage()._cdata for tensor in given.tensors}
    return all(map(_is_usual, made)) and len({*memories}) == len(memories) and taken.isdisjoint(memories)
