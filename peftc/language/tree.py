"""The frozen syntax tree of a specification. Nodes compare without their spans."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import peftc.language.globs as patterns
from peftc.diagnostics.source import Source, Span


@dataclass(frozen=True)
class Node:
    """Anything read from a specification."""

    span: Span = field(compare=False, repr=False, kw_only=True)


class Statement(Node):
    """One line of a specification."""


class Value(Node):
    """What a parameter is given."""


class Selector(Node):
    """A set of sites."""


@dataclass(frozen=True)
class Name(Value):
    text: str


@dataclass(frozen=True)
class Number(Value):
    value: int | float
    unit: str | None = None

    @property
    def scaled(self) -> int | float:
        """The number its unit stands for: 1% is 0.01, 24 GiB is 25769803776, 7B is 7000000000."""
        if self.unit == "%":
            return self.value / 100
        return self.value * UNITS[self.unit] if self.unit else self.value


UNITS = {
    "%": 0.01,
    **{"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
    **{"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12},
}


@dataclass(frozen=True)
class Bool(Value):
    value: bool


@dataclass(frozen=True)
class String(Value):
    value: str


@dataclass(frozen=True)
class ListValue(Value):
    items: tuple[Value, ...]


@dataclass(frozen=True)
class Arg(Node):
    """`name=value`, or a bare value (`name` is None); all bare values come first and no name comes twice."""

    name: Name | None
    value: Value


@dataclass(frozen=True)
class Call(Value):
    """A method, storage format or quantity with its parameters; `apply ia3` is `apply ia3()`."""

    name: Name
    args: tuple[Arg, ...] = ()


@dataclass(frozen=True)
class Role(Selector):
    """A dotted word such as `attn.q`, `mlp.*`, `norm`. A single word may also be a name made by `let`."""

    parts: tuple[str, ...]

    @property
    def text(self) -> str:
        return ".".join(self.parts)


@dataclass(frozen=True)
class Glob(Selector):
    """A pattern for module names: `*` is a segment or part of one, `**` any number, `{a,b}` a choice."""

    pattern: str

    def regex(self) -> re.Pattern[str]:
        """The same for `fullmatch`. `**` may stand for no segment: `a.**` matches `a`."""
        return re.compile(patterns.regex(self.pattern))


@dataclass(frozen=True)
class Regex(Selector):
    """A regular expression as written between the slashes, `\\/` for a slash; valid for `re.compile`.

    It is Python's, so one with repeats in repeats, such as `(a+)+b`, may take forever to match: `matching` sets a
    limit. Name patterns never do.
    """

    pattern: str


@dataclass(frozen=True)
class Union(Selector):
    items: tuple[Selector, ...]


@dataclass(frozen=True)
class Intersect(Selector):
    items: tuple[Selector, ...]


@dataclass(frozen=True)
class Except(Selector):
    base: Selector
    removed: Selector


@dataclass(frozen=True)
class Filter(Selector):
    """The sites of `base` that satisfy a condition."""

    base: Selector


@dataclass(frozen=True)
class InLayers(Filter):
    """`in layers[start:stop:step]`, with Python's meaning; `layers[3]` is read as `layers[3:4]`."""

    start: int | None = None
    stop: int | None = None
    step: int | None = None


@dataclass(frozen=True)
class InStack(Filter):
    """`in encoder`, `in decoder` or `in` a group."""

    name: Name


@dataclass(frozen=True)
class Where(Filter):
    """`where in_features >= 1024`."""

    field: Name
    op: str
    value: Value


def within(selector: Selector) -> tuple[Selector, ...]:
    """The selectors that one is made of."""
    match selector:
        case Union(items) | Intersect(items):
            return items
        case Except(base, removed):
            return (base, removed)
        case Filter(base):
            return (base,)
    return ()


@dataclass(frozen=True)
class Apply(Statement):
    method: Call
    target: Selector | None


@dataclass(frozen=True)
class Quantize(Statement):
    target: Selector
    storage: Call


@dataclass(frozen=True)
class Train(Statement):
    target: Selector


@dataclass(frozen=True)
class Freeze(Statement):
    target: Selector


@dataclass(frozen=True)
class Checkpoint(Statement):
    """Blocks of which a training step keeps the input alone."""

    target: Selector


@dataclass(frozen=True)
class Let(Statement):
    """A name for a selector or a method. A bare word on the right is a `Role` until the plan knows better."""

    name: Name
    value: Selector | Call


@dataclass(frozen=True)
class Task(Statement):
    name: Name
    body: tuple[Statement, ...]


@dataclass(frozen=True)
class Group(Statement):
    names: tuple[Name, ...]
    call: Call


@dataclass(frozen=True)
class Require(Statement):
    quantity: Call
    op: str
    value: Number


@dataclass(frozen=True)
class Fit(Statement):
    """A budget that is met by choosing: `using` has `checkpoint` and storages, none where the statement names none."""

    quantity: Call
    op: str
    value: Number
    using: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Use(Statement):
    """`spec` is what the file says, once it has been read; comparisons leave it out."""

    path: String
    spec: Spec | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Spec(Node):
    statements: tuple[Statement, ...]
    source: Source = field(compare=False, repr=False)
