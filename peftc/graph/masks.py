"""What a mask of a captured graph says, read off the operations that make it: who sees whom, whatever the sizes are.

Each value is one expression for all its elements, in the places I(-1), I(-2), … that an element stands at, counted from
the last dimension: so an expression stays what it is when values are broadcast against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftc.graph.ir import expression, is_tensor, value

aten = torch.ops.aten


@dataclass(frozen=True)
class Place:
    """Where an element stands along a dimension, counted from the last, which is -1."""

    dim: int


@dataclass(frozen=True)
class Read:
    """An entry of an input [rows, tokens], or of what is made of it: `of` is POSITION, STEP, FIRST or TEXT."""

    of: str
    source: fx.Node
    row: Any
    token: Any


@dataclass(frozen=True)
class Sum:
    """A term and a whole number; of no term, the number."""

    term: Any
    number: int


@dataclass(frozen=True)
class Compared:
    """How two sums compare, by the name that `operator` has for it."""

    how: str
    left: Sum
    right: Sum


# An input's entry; how far it is from the one before (a first one by 1); whether not by 1; how often it was not.
POSITION, STEP, FIRST, TEXT = "position", "step", "first", "text"
All = frozenset  # of comparisons that hold together: a mask; of none, yes
Value = Sum | frozenset[Any]


@dataclass(frozen=True)
class Seen:
    """What a mask [rows, heads or 1, queries, keys] lets a query see.

    causal      no token behind it
    window      of those in front, itself among them, the last so many
    positions   the input by which texts are told apart; a query sees its own alone. None where all tokens are one
    """

    causal: bool = False
    window: int | None = None
    positions: fx.Node | None = None


def seen(mask: fx.Node) -> Seen | None:
    """What a mask of yes and no says; None where it says more than that, or says it otherwise."""
    if not is_tensor(mask) or value(mask).dtype != torch.bool or value(mask).dim() != 4:
        return None
    try:
        said = _Reader().read(mask)
    except UnreadError:
        return None
    return _in_words(said) if isinstance(said, frozenset) else None


def _in_words(said: frozenset[Any]) -> Seen | None:
    texts: set[fx.Node] = set()
    rules: list[tuple[Any, Any, int, str]] = []  # query's term, key's, number: query - key how number
    for item in said:
        query, key, number, how = item.left.term, item.right.term, item.right.number - item.left.number, item.how
        if _dim(query) == -1 and _dim(key) == -2:
            query, key, number, how = key, query, -number, _TURNED[how]
        if _dim(query) != -2 or _dim(key) != -1 or _moved(query, -1) != key:
            return None
        if isinstance(query, Read) and query.of == TEXT:
            if how != "eq" or number:
                return None
            texts.add(query.source)
        else:
            rules.append((query, key, number, how))
    if len(texts) > 1:
        return None
    found = Seen(positions=next(iter(texts), None))
    for query, _, number, how in rules:
        # Within a text positions count on by one, and so do places in the row; across texts only the latter order.
        if isinstance(query, Read) and (query.of != POSITION or query.source not in texts):
            return None
        if (how, number) in (("ge", 0), ("gt", -1)):
            found = Seen(True, found.window, found.positions)
        elif how in ("lt", "le"):
            window = number + (how == "le")
            if window < 1 or found.window is not None:
                return None
            found = Seen(found.causal, window, found.positions)
        else:
            return None
    return found if found.causal or found.window is None else None


_TURNED = {"eq": "eq", "ge": "le", "le": "ge", "gt": "lt", "lt": "gt"}


def _dim(term: Any) -> int | None:
    """The dimension whose place decides which token a term is about."""
    token = term.token if isinstance(term, Read) else term
    if isinstance(term, Read) and term.row != Sum(Place(-4), 0):
        return None
    token = token.term if isinstance(token, Sum) and not token.number else token
    return token.dim if isinstance(token, Place) else None


def _moved(term: Any, dim: int) -> Any:
    """The term about the token that another dimension's place names."""
    if isinstance(term, Read):
        return Read(term.of, term.source, term.row, Sum(Place(dim), 0))
    return Place(dim)


def _over(term: Any, change: Callable[[Place], Any]) -> Any:
    """A value with each place in it changed."""
    if isinstance(term, Place):
        return change(term)
    if isinstance(term, Read):
        return Read(term.of, term.source, _over(term.row, change), _over(term.token, change))
    if isinstance(term, Sum):
        return term if term.term is None else _added(_over(term.term, change), term.number)
    if isinstance(term, Compared):
        return Compared(term.how, _over(term.left, change), _over(term.right, change))
    return All(_over(item, change) for item in term)


def _added(term: Any, number: int) -> Sum:
    return Sum(term.term, term.number + number) if isinstance(term, Sum) else Sum(term, number)


class UnreadError(Exception):
    """A mask is made by an operation, or says something, that is not known here."""


class _Reader:
    """Reads values off their nodes, each once.

    Raises:
        UnreadError: at an operation that it does not know.
    """

    def __init__(self) -> None:
        self.known: dict[fx.Node, Value] = {}

    def read(self, node: Any) -> Value:
        if isinstance(node, bool):
            raise UnreadError
        if isinstance(node, int):
            return Sum(None, node)
        if not isinstance(node, fx.Node) or not is_tensor(node):
            raise UnreadError
        if node not in self.known:
            self.known[node] = self._made(node)
        return self.known[node]

    def _made(self, node: fx.Node) -> Value:
        if node.op == "placeholder":
            if value(node).dim() != 2 or value(node).is_floating_point() or value(node).dtype == torch.bool:
                raise UnreadError
            return Sum(Read(POSITION, node, Sum(Place(-2), 0), Sum(Place(-1), 0)), 0)
        if node.op != "call_function" or (rule := _RULES.get(node.target)) is None:
            raise UnreadError
        return rule(self, node)

    def number(self, node: Any) -> Sum:
        found = self.read(node)
        if not isinstance(found, Sum):
            raise UnreadError
        return found

    def read_entry(self, node: Any, of: str) -> Read:
        """An entry of a table of that kind, at its own place."""
        found = self.number(node)
        if found.number or found.term != Read(of, getattr(found.term, "source", None), *_OWN):  # type: ignore[arg-type]
            raise UnreadError
        return found.term  # type: ignore[no-any-return]


_OWN = (Sum(Place(-2), 0), Sum(Place(-1), 0))


def _same(reader: _Reader, node: fx.Node) -> Value:
    return reader.read(node.args[0])


def _expand(reader: _Reader, node: fx.Node) -> Value:
    return reader.read(node.args[0])  # what is repeated has no place along that dimension


def _slice(reader: _Reader, node: fx.Node) -> Value:
    rest: tuple[Any, ...] = (None, 0, 0, None, 1)
    source, dim, start, _, step = node.args + rest[len(node.args) :]
    assert isinstance(source, fx.Node)
    assert isinstance(dim, int)
    found = reader.read(source)
    before, after = ([expression(size) for size in value(item).shape] for item in (source, node))
    dim -= len(before) if dim >= 0 else 0
    if start in (0, None) and step == 1 and before == after:
        return found
    if isinstance(start, int) and start >= 0 and after[dim] == 1:  # one entry of it
        result: Value = _over(found, lambda place: Sum(None, start) if place.dim == dim else place)
        return result
    raise UnreadError


def _unsqueeze(reader: _Reader, node: fx.Node) -> Value:
    dim = node.args[1]
    assert isinstance(dim, int)
    at = dim if dim < 0 else dim - value(node).dim()
    result: Value = _over(reader.read(node.args[0]), lambda place: Place(place.dim - (place.dim <= at)))
    return result


def _arange(reader: _Reader, node: fx.Node) -> Value:
    if node.target is aten.arange.start and node.args[0] != 0:
        raise UnreadError
    return Sum(Place(-1), 0)


def _plus(sign: int) -> Callable[[_Reader, fx.Node], Value]:
    def rule(reader: _Reader, node: fx.Node) -> Value:
        left, right = (reader.number(argument) for argument in node.args[:2])
        if right.term is not None or node.kwargs:
            raise UnreadError
        return _added(left, sign * right.number)

    return rule


def _index(reader: _Reader, node: fx.Node) -> Value:
    source, (row, token) = node.args[0], _two(node.args[1])
    found = reader.number(source)
    places = {-2: reader.number(row), -1: reader.number(token)}
    result: Value = _over(found, lambda place: places[place.dim])
    return result


def _two(given: Any) -> tuple[Any, Any]:
    if not isinstance(given, Sequence) or len(given) != 2 or None in given:
        raise UnreadError
    return given[0], given[1]


def _diff(reader: _Reader, node: fx.Node) -> Value:
    """Each position less the one before; before the first stands one less than the first."""
    if node.kwargs or len(node.args) != 4 or node.args[1] != 1 or node.args[2] not in (-1, 1):
        raise UnreadError
    entry = reader.read_entry(node.args[0], POSITION)
    before = _added(Read(POSITION, entry.source, entry.row, Sum(None, 0)), -1)
    if reader.read(node.args[3]) != before:
        raise UnreadError
    return Sum(Read(STEP, entry.source, *_OWN), 0)


def _not_one(reader: _Reader, node: fx.Node) -> Value:
    if node.args[1] != 1:
        raise UnreadError
    return Sum(Read(FIRST, reader.read_entry(node.args[0], STEP).source, *_OWN), 0)


def _count(reader: _Reader, node: fx.Node) -> Value:
    if node.args[1] not in (-1, 1):
        raise UnreadError
    return Sum(Read(TEXT, reader.read_entry(node.args[0], FIRST).source, *_OWN), 0)


def _compare(how: str) -> Callable[[_Reader, fx.Node], Value]:
    def rule(reader: _Reader, node: fx.Node) -> Value:
        left, right = (reader.number(argument) for argument in node.args)
        if left.term is None and right.term is None:
            raise UnreadError
        if right.term is None or left.term is None:
            return _known(how, left, right)
        return All([Compared(how, left, right)])

    return rule


def _known(how: str, left: Sum, right: Sum) -> Value:
    """A place compared with a number: places are never below 0."""
    if isinstance(left.term, Place) and how == "ge" and right.number - left.number <= 0:
        return All()
    raise UnreadError


def _both(reader: _Reader, node: fx.Node) -> Value:
    left, right = (reader.read(argument) for argument in node.args)
    if not isinstance(left, frozenset) or not isinstance(right, frozenset):
        raise UnreadError
    return left | right


def _yes(reader: _Reader, node: fx.Node) -> Value:
    if value(node).dtype != torch.bool:
        raise UnreadError
    return All()


_RULES: Mapping[Any, Callable[[_Reader, fx.Node], Value]] = {
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.unsqueeze.default: _unsqueeze,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.add.Tensor: _plus(1),
    aten.sub.Tensor: _plus(-1),
    aten.index.Tensor: _index,
    aten.diff.default: _diff,
    aten.ne.Scalar: _not_one,
    aten.cumsum.default: _count,
    aten.new_ones.default: _yes,
    aten.ones.default: _yes,
    aten.__and__.Tensor: _both,
    aten.bitwise_and.Tensor: _both,
    aten.logical_and.default: _both,
    **{getattr(getattr(aten, how), kind): _compare(how) for how in _TURNED for kind in ("Tensor", "Scalar")},
}
