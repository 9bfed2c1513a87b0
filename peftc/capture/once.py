"""Equal blocks are traced once: for the others, a model calls an operation that stands for them.

The whole of the model runs while it is captured, but for the insides of blocks that are equal to one that ran, called
with equal arguments: tensors of the same sizes, in symbols, and other things that are the same. In the graph there is
for each of these one node, with the block's tensors for its operands, and around the one that ran there are two marks.
`repeat` writes what is between the marks in the place of each such node.

Nothing is guessed: a block that looks at the number which tells it from the others, writes on itself or on what it is
given, or returns what has no numbers of its own, is traced each time. `NotAlike` says that a trace showed what could
not be known before; then the model is captured without this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from transformers.exporters.utils import patch_attributes

from peftc.capture.alike import PLAIN, Group, Watched, groups_of
from peftc.capture.untouched import watched
from peftc.graph.ir import expression
from peftc.graph.repeat import BEGIN, END, STANDS

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
            tuple(memories.index(one) for one in memories), tuple(map(_sizes, self.tensors)),
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


def _sizes(tensor: Tensor) -> Any:
    numbers = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    return tuple(map(expression, numbers)), tensor.dtype, tensor.device, tensor.requires_grad


@dataclass
class _Once:
    """A capture in which equal blocks are traced once."""

    _ran: dict[Any, tuple[int, _Given]] = field(default_factory=dict)
    _called: set[str] = field(default_factory=set)
    _apart: set[int] = field(default_factory=set)
    _kinds: Iterator[int] = field(default_factory=count)

    def instead_of(
        self, number: int, group: Group, path: str, block: nn.Module, own: Callable[..., Any]
    ) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = _Given.of((args, kwargs))
            looks = given.looks() if given is not None else None
            again = path in self._called
            self._called.add(path)
            if given is None or looks is None or again or number in self._apart:
                return own(*args, **kwargs)
            if (number, looks) in self._ran:
                kind, known = self._ran[number, looks]
                like = known.tensors[len(given.tensors) :]
                return known.with_tensors([*given.tensors, *STANDS(kind, path, given.tensors, like)])
            kind = next(self._kinds)
            changed = watched(block)
            BEGIN(kind, path, given.tensors)
            with _watching(block, group) as used:
                found = own(*args, **kwargs)
            returned = _Given.of(found, given.tensors)
            END(kind, [] if returned is None else returned.tensors[len(given.tensors) :])
            same = given.is_same(_Given.of((args, kwargs)))
            if returned is None or used or changed() or not same or not _is_new(returned, given):
                self._apart.add(number)
            else:
                # What it asked may have made two sizes one: the next block is given them so.
                self._ran[number, given.looks()] = kind, returned
            return found

        return forward


@contextmanager
def tracing_once(model: nn.Module) -> Iterator[None]:
    """While it is open, of equal blocks of `model` that are called with equal arguments one runs."""
    once, patches = _Once(), []
    for number, group in enumerate(groups_of(model)):
        for path in group.paths:
            block = model.get_submodule(path)
            instead = once.instead_of(number, group, path, block, block.forward)
            patches.append((block, "forward", lambda _own, instead=instead: instead))
    with patch_attributes(patches):
        yield


def _is_new(returned: _Given, given: _Given) -> bool:
    """Whether each tensor that a block made is one of sizes, in memory of its own."""
    made = returned.tensors[len(given.tensors) :]
    memories = [tensor.untyped_storage()._cdata for tensor in made]
    taken = {tensor.untyped_storage()._cdata for tensor in given.tensors}
    return all(map(_is_usual, made)) and len({*memories}) == len(memories) and taken.isdisjoint(memories)


@contextmanager
def _watching(block: nn.Module, group: Group) -> Iterator[list[None]]:
    """Yields what is filled when the block looks at one of the numbers that tell it from the others."""
    used: list[None] = []
    own = {(path, name): vars(block.get_submodule(path))[name] for path, name in group.counting}
    for (path, name), number in own.items():
        vars(block.get_submodule(path))[name] = Watched(number, used)
    try:
        yield used
    finally:
        for (path, name), number in own.items():
            vars(block.get_submodule(path))[name] = number
