"""What a Triton kernel reads and writes of its arguments, told by its source: of one launch, with its constants.

An argument is read where it is part of the address that a `tl.load` is given, and written where that of a `tl.store`
is made from it. Branches on constants go the way that the launch's constants say.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Gt: lambda one, other: one > other,
    ast.GtE: lambda one, other: one >= other,
    ast.Lt: lambda one, other: one < other,
    ast.LtE: lambda one, other: one <= other,
    ast.Eq: lambda one, other: one == other,
    ast.NotEq: lambda one, other: one != other,
}


@dataclass(frozen=True)
class Touched:
    """Names of arguments: tensors, and numbers that a function of the kernel's is given."""

    read: frozenset[str]
    written: frozenset[str]


def touched(kernel: Any, given: Mapping[str, Any]) -> Touched:
    """What a launch of `kernel`, a `triton.jit` function, with arguments `given` by name reads and writes."""
    constants = {item.name: given[item.name] for item in kernel.params if item.is_constexpr and item.name in given}
    return _touched(kernel.src, frozenset(kernel.arg_names), tuple(constants.items()))


@lru_cache(maxsize=256)
def _touched(text: str, arguments: frozenset[str], constants: tuple[tuple[str, Any], ...]) -> Touched:
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    source = _Source(arguments, dict(constants))
    source.run(function.body)
    return Touched(frozenset(source.read), frozenset(source.written))


@dataclass
class _Source:
    """One walk over a kernel: `made` says of which arguments a variable may be, whichever way was gone."""

    arguments: frozenset[str]
    constants: Mapping[str, Any]
    made: dict[str, set[str]] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)

    def run(self, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            if isinstance(statement, ast.If):
                decided = self._decided(statement.test)
                self.run([] if decided is False else statement.body)
                self.run([] if decided is True else statement.orelse)
            elif isinstance(statement, ast.For | ast.While):
                self.run(statement.body)
                self.run(statement.body)  # what a round has made, the next one may use
            else:
                self._look(statement)
                if isinstance(statement, ast.Assign | ast.AugAssign):
                    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                    for target in targets:
                        self._assign(target, statement.value)

    def _decided(self, test: ast.expr) -> bool | None:
        """The value of a test of constants; None where it is known on the device alone."""
        if isinstance(test, ast.Name) and test.id in self.constants:
            return bool(self.constants[test.id])
        if isinstance(test, ast.Compare) and isinstance(test.left, ast.Name) and test.left.id in self.constants:
            compare, other = COMPARISONS.get(type(test.ops[0])), test.comparators[0]
            if compare is not None and isinstance(other, ast.Constant):
                return bool(compare(self.constants[test.left.id], other.value))
        return None

    def _look(self, statement: ast.stmt) -> None:
        for call in (node for node in ast.walk(statement) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if name == "tl.load":
                self.read |= self._of(call.args[0])
            elif name == "tl.store":
                self.written |= self._of(call.args[0])
            elif not name.startswith("tl."):  # a function of the kernel's own, which is given an address to read
                self.read |= {item.id for item in call.args if isinstance(item, ast.Name)} & self.arguments

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=True):
                self._assign(one, other)
            return
        for name in _names(target):
            self.made.setdefault(name, set()).update(self._of(value))

    def _of(self, value: ast.expr) -> set[str]:
        """The arguments that a value is made from."""
        found = set(_names(value))
        return set().union(found & self.arguments, *(self.made.get(name, ()) for name in found))


def _names(value: ast.expr) -> Iterator[str]:
    """Names in an expression, but for what is only asked for its type."""
    if isinstance(value, ast.Attribute) and value.attr == "dtype":
        return
    if isinstance(value, ast.Name):
        yield value.id
    for child in ast.iter_child_nodes(value):
        if isinstance(child, ast.expr | ast.keyword):
            yield from _names(child.value if isinstance(child, ast.keyword) else child)
