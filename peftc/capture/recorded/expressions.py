"""Symbolic sizes as plain lists and back: nothing is evaluated that a file says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
from sympy.core.function import Application
from torch.utils._sympy import functions

from peftc.capture.recorded.errors import NotRecordedError

PLAIN = (
    sympy.Add, sympy.Mul, sympy.Pow, sympy.Eq, sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.And, sympy.Or,
    sympy.Not, sympy.Max, sympy.Min, sympy.Abs, sympy.Mod, sympy.floor, sympy.ceiling, sympy.Piecewise,
)  # fmt: skip
OF_TORCH = {
    name: kind for name, kind in vars(functions).items() if isinstance(kind, type) and issubclass(kind, Application)
}
KINDS: dict[str, Any] = {kind.__name__: kind for kind in PLAIN} | {
    f"torch.{name}": kind for name, kind in OF_TORCH.items() if kind not in PLAIN
}
NAMES = {kind: name for name, kind in KINDS.items()}


def as_lists(expression: sympy.Basic | int, symbols: Mapping[sympy.Symbol, int]) -> Any:
    """A number as it is, a symbol as ["symbol", its place], an operation as its name and operands.

    Raises:
        NotRecordedError: where there is anything else in it.
    """
    if isinstance(expression, int | sympy.Integer):
        return int(expression)
    if expression in (sympy.true, sympy.false):
        return ["bool", bool(expression)]
    if isinstance(expression, sympy.Rational):
        return ["Rational", int(expression.p), int(expression.q)]
    if isinstance(expression, sympy.Float):
        return ["Float", float(expression).hex()]
    if isinstance(expression, sympy.Symbol) and expression in symbols:
        return ["symbol", symbols[expression]]
    if (name := NAMES.get(type(expression))) is not None:
        return [name, *(as_lists(operand, symbols) for operand in expression.args)]
    raise NotRecordedError(f"{expression} has a {type(expression).__name__} in it")


def from_lists(told: Any, symbols: Sequence[sympy.Symbol]) -> Any:
    """The expression, of these symbols.

    Raises:
        NotRecordedError: where it is none.
    """
    if isinstance(told, int):
        return sympy.Integer(told)
    name, *operands = told
    if name == "bool":
        return sympy.true if operands[0] is True else sympy.false
    if name == "Rational":
        return sympy.Rational(*map(int, operands))
    if name == "Float":
        return sympy.Float(float.fromhex(operands[0]))
    if name == "symbol":
        return symbols[int(operands[0])]
    if name not in KINDS:
        raise NotRecordedError(f"{name} is no operation on sizes")
    return KINDS[name](*(from_lists(operand, symbols) for operand in operands))
