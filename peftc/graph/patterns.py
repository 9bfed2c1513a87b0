"""Patterns over a captured graph: operations and how values flow between them, never names.

A pattern is an expression of `op`, `value`, `number` and what combines them. Matching starts at the node whose value
is the pattern's result and walks to its inputs. What fails is a value, too: a `Miss` says which node differed, and how
many nodes had fitted before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx

from peftc.graph.ir import is_tensor

aten = torch.ops.aten

CASTS = {aten.to.dtype, aten.type_as.default}


@dataclass(frozen=True, eq=False)
class Match:
    """A place where a pattern fits: its root, the other nodes it replaces, and what it named."""

    root: fx.Node
    inner: tuple[fx.Node, ...]
    named: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.named.get(name)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes that go, each before the ones that it reads."""
        return (self.root, *self.inner)


@dataclass(frozen=True)
class Miss:
    """Where something nearly fitted, and what stood in the way.

    `depth` nodes fitted before it did; where all did, and the rule refused the place, it is `refused`.
    """

    root: fx.Node
    reason: str
    culprits: tuple[fx.Node, ...] = ()
    depth: int = 0
    refused: bool = False

    def __str__(self) -> str:
        return f"{self.root.name}: {self.reason}"


@dataclass
class _State:
    root: fx.Node
    inner: list[fx.Node] = field(default_factory=list)
    named: dict[str, Any] = field(default_factory=dict)
    nearest: Miss | None = None

    def fail(self, culprit: object, reason: Callable[[], str]) -> bool:
        """Most misses are forgotten for one that came nearer: the reason is put into words only for that."""
        depth = len(self.inner)
        if self.nearest is None or depth > self.nearest.depth:
            culprits = (culprit,) if isinstance(culprit, fx.Node) else ()
            self.nearest = Miss(self.root, reason(), culprits, depth)
        return False

    def attempt(self, pattern: Pattern, found: object) -> bool:
        """Tries `pattern`, and forgets what it named where it does not fit, and what did not fit where it does."""
        if isinstance(found, fx.Node) and not pattern.may_begin(found):
            return pattern.fits(found, self)  # it does not, and says so before it names anything
        inner, named, nearest = list(self.inner), dict(self.named), self.nearest
        if pattern.fits(found, self):
            self.nearest = nearest
            return True
        self.inner, self.named = inner, named
        return False

    def name(self, name: str | None, found: object) -> bool:
        if name is None:
            return True
        known = self.named.setdefault(name, found)
        same = known is found or (not isinstance(found, fx.Node) and known == found)
        return same or self.fail(found, lambda: f"{found} stands where {known} is to be read again")


class Pattern:
    """Base of the expressions. What follows from one is worked out once: it is tried at every node of every graph."""

    def fits(self, found: object, state: _State) -> bool:
        """Whether `found`, a node or a constant, is what the pattern describes; `state` collects what it names."""
        raise NotImplementedError

    @cached_property
    def size(self) -> int:
        """How many operations the pattern has at least."""
        return 0

    @cached_property
    def roots(self) -> frozenset[Any] | None:
        """The operations, or the names of some, that its result can be of; None where it can be of any."""
        return None

    @cached_property
    def needed(self) -> frozenset[frozenset[Any]]:
        """Of each of these, one operation at least is in every graph that has the pattern."""
        return frozenset()

    def may_begin(self, node: fx.Node) -> bool:
        """Whether it is worth trying at `node`."""
        return self.roots is None or node.target in self.roots or (self._by_name and str(node.target) in self.roots)

    @cached_property
    def _by_name(self) -> bool:
        return any(isinstance(root, str) for root in self.roots or ())

    def match(self, root: fx.Node) -> Match | Miss:
        """At one node."""
        state = _State(root)
        if self.fits(root, state):
            inner = dict.fromkeys(node for node in state.inner if node is not root)
            return Match(root, tuple(inner), state.named)
        assert state.nearest is not None
        return state.nearest


@dataclass(frozen=True)
class _Value(Pattern):
    label: str | None
    where: Callable[[fx.Node], str | None] | None

    def fits(self, found: object, state: _State) -> bool:
        if not isinstance(found, fx.Node) or not is_tensor(found):
            return state.fail(found, lambda: f"{found} is no tensor")
        if self.where is not None and (reason := self.where(found)):
            return state.fail(found, lambda: reason)
        return state.name(self.label, found)


@dataclass(frozen=True)
class _Anything(Pattern):
    label: str

    def fits(self, found: object, state: _State) -> bool:
        return state.name(self.label, found)


@dataclass(frozen=True)
class _Several(Pattern):
    members: tuple[Pattern, ...]

    @cached_property
    def size(self) -> int:
        return sum(map(_size, self.members))

    @cached_property
    def needed(self) -> frozenset[frozenset[Any]]:
        return _needed(self.members)

    def fits(self, found: object, state: _State) -> bool:
        if not isinstance(found, list | tuple) or len(found) != len(self.members):
            return state.fail(found, lambda: f"{found} is no list of {len(self.members)}")
        return all(member.fits(item, state) for member, item in zip(self.members, found, strict=True))


@dataclass(frozen=True)
class _Number(Pattern):
    label: str | None
    near: float | None

    def fits(self, found: object, state: _State) -> bool:
        if isinstance(found, bool) or not isinstance(found, int | float):
            return state.fail(found, lambda: f"{found} is no number")
        if self.near is not None and abs(found - self.near) > 1e-6 * abs(self.near):
            return state.fail(found, lambda: f"{found:g} is not {self.near:g}")
        return state.name(self.label, float(found))


@dataclass(frozen=True)
class _Op(Pattern):
    targets: tuple[Any, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    label: str | None
    commutative: bool

    @cached_property
    def size(self) -> int:
        return 1 + sum(map(_size, self.arguments))

    @cached_property
    def roots(self) -> frozenset[Any] | None:
        return frozenset(self.targets)

    @cached_property
    def needed(self) -> frozenset[frozenset[Any]]:
        return _needed((*self.arguments, *self.keywords.values())) | {frozenset(self.targets)}

    def fits(self, found: object, state: _State) -> bool:
        if not isinstance(found, fx.Node) or not self.may_begin(found):
            return state.fail(found, lambda: f"{_described(found)}, not {_short(self.targets[0])}")
        if found.kwargs.keys() != self.keywords.keys() or len(found.args) != len(self.arguments):
            return state.fail(found, lambda: f"{found.name} has other options: {found.args[1:]} {found.kwargs}")
        state.inner.append(found)
        if not all(self._is_option(found, name, state) for name in self.keywords):
            return False
        if not any(state.attempt(order, found) for order in self._orders):
            return False
        return state.name(self.label, found)

    def _is_option(self, found: fx.Node, name: str, state: _State) -> bool:
        given, wanted = found.kwargs[name], self.keywords[name]
        if isinstance(wanted, Pattern):
            return wanted.fits(given, state)
        return given == wanted or state.fail(found, lambda: f"{found.name} has another option: {name}={given}")

    @cached_property
    def _orders(self) -> list[_Arguments]:
        orders = [self.arguments, self.arguments[::-1]] if self.commutative else [self.arguments]
        return [_Arguments(order) for order in orders]


@dataclass(frozen=True)
class _Arguments(Pattern):
    """All arguments of one node, in one order."""

    wanted: tuple[Any, ...]

    @cached_property
    def _most_first(self) -> list[int]:
        """The places of what says most, first: misses tell more then."""
        return sorted(range(len(self.wanted)), key=lambda place: -_size(self.wanted[place]))

    def may_begin(self, node: fx.Node) -> bool:
        if not self.wanted:
            return True
        given, wanted = node.args[self._most_first[0]], self.wanted[self._most_first[0]]
        return not (isinstance(wanted, Pattern) and isinstance(given, fx.Node)) or wanted.may_begin(given)

    def fits(self, found: object, state: _State) -> bool:
        assert isinstance(found, fx.Node)
        for place in self._most_first:
            given, wanted = found.args[place], self.wanted[place]
            if isinstance(wanted, Pattern):
                if not wanted.fits(given, state):
                    return False
            elif given != wanted:
                return state.fail(found, partial("{} reads {}, not {}".format, found.name, given, wanted))
        return True


@dataclass(frozen=True)
class _Either(Pattern):
    choices: tuple[Pattern, ...]

    @cached_property
    def size(self) -> int:
        return min(choice.size for choice in self.choices)

    @cached_property
    def roots(self) -> frozenset[Any] | None:
        known = [choice.roots for choice in self.choices]
        return None if None in known else frozenset().union(*(roots for roots in known if roots is not None))

    @cached_property
    def needed(self) -> frozenset[frozenset[Any]]:
        return frozenset.intersection(*(choice.needed for choice in self.choices))

    def fits(self, found: object, state: _State) -> bool:
        before = state.nearest
        if not any(state.attempt(choice, found) for choice in self.choices):
            return False
        state.nearest = before
        return True


@dataclass(frozen=True)
class _Cast(Pattern):
    """The pattern behind any number of casts; the first of them, if any, gets the label."""

    pattern: Pattern
    label: str | None

    @cached_property
    def size(self) -> int:
        return self.pattern.size

    @cached_property
    def roots(self) -> frozenset[Any] | None:
        return None if self.pattern.roots is None else self.pattern.roots | CASTS

    @cached_property
    def needed(self) -> frozenset[frozenset[Any]]:
        return self.pattern.needed

    def fits(self, found: object, state: _State) -> bool:
        if isinstance(found, fx.Node) and found.target in CASTS and state.attempt(_Through(self), found):
            return True
        return self.pattern.fits(found, state)


@dataclass(frozen=True)
class _Through(Pattern):
    cast: _Cast

    def fits(self, found: object, state: _State) -> bool:
        assert isinstance(found, fx.Node)
        state.inner.append(found)
        return _Cast(self.cast.pattern, None).fits(found.args[0], state) and state.name(self.cast.label, found)


def op(target: Any, *arguments: Any, name: str | None = None, commutative: bool = False, **keywords: Any) -> Pattern:
    """An operation (or one of several that do the same) with exactly these arguments: patterns, or constants.

    One that is registered only when some library is imported goes by its name, `library.name.overload`.
    """
    targets = target if isinstance(target, tuple) else (target,)
    return _Op(targets, arguments, keywords, name, commutative)


def value(name: str | None = None, where: Callable[[fx.Node], str | None] | None = None) -> Pattern:
    """Any tensor; the same one wherever `name` stands again. `where` gives a reason against a node, or None."""
    return _Value(name, where)


def anything(name: str) -> Pattern:
    """Any argument at all: a flag, a list, a node."""
    return _Anything(name)


def several(*members: Pattern) -> Pattern:
    """A list of as many arguments, in this order."""
    return _Several(members)


def number(name: str | None = None, near: float | None = None) -> Pattern:
    """A constant, or the one that `near` is to within single precision."""
    return _Number(name, near)


def either(*choices: Pattern) -> Pattern:
    """The first of several patterns that fits."""
    return _Either(choices)


def cast(pattern: Pattern, name: str | None = None) -> Pattern:
    """The pattern, with or without casts behind it; `name` is the outermost cast where there is one."""
    return _Cast(pattern, name)


def add(left: Any, right: Any, name: str | None = None) -> Pattern:
    """A sum, in either order."""
    return op(aten.add.Tensor, left, right, name=name, commutative=True)


def mul(left: Any, right: Any, name: str | None = None) -> Pattern:
    """A product entry by entry, in either order."""
    return op(aten.mul.Tensor, left, right, name=name, commutative=True)


def read_elsewhere(match: Match, free: Iterable[fx.Node] = ()) -> Miss | None:
    """The miss of a match whose inner values something else reads, too: fused, they would be computed twice.

    A cast is, at no great cost, and so are those in `free`.
    """
    own = set(match.nodes)
    for node in match.inner:
        others = [user for user in node.users if user not in own]
        if others and node.target not in CASTS and node not in free:
            return Miss(match.root, f"{node.name} is read by {others[0].name}, too", (node, *others))
    return None


def _needed(arguments: Iterable[Any]) -> frozenset[frozenset[Any]]:
    return frozenset().union(*(argument.needed for argument in arguments if isinstance(argument, Pattern)))


def _size(argument: Any) -> int:
    return argument.size if isinstance(argument, Pattern) else 0


def _short(target: Any) -> str:
    if isinstance(target, str):
        return target.split(".")[1]
    return target._schema.name.partition("::")[2] if isinstance(target, torch._ops.OpOverload) else str(target)


def _described(found: object) -> str:
    if not isinstance(found, fx.Node):
        return f"{found} is a constant"
    return f"{found.name} is {_short(found.target)}" if found.op == "call_function" else f"{found} is computed nowhere"
