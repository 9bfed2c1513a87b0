"""Settings of a folder -> statements of the language. They are values: none of them ever becomes text that is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peftc import language as ast
from peftc.diagnostics.source import Source, Span

NOWHERE = Span(Source("", ""), 0, 0)


def spec_of(name: str, statements: Iterable[ast.Statement]) -> ast.Spec:
    """The statements as a spec, whose text, for diagnostics to point at, is made of them; `name` is its source's.

    Raises:
        PeftcError: where a statement cannot be said in the language.
        ValueError: where it would say something else.
    """
    made = ast.Spec(tuple(statements), NOWHERE.source, span=NOWHERE)
    read = ast.parse(Source(name, ast.unparse(made)))
    if read != made:
        raise ValueError("a setting cannot be said in the language")
    return read


def applied(method: str, settings: Mapping[str, Any], modules: Iterable[str] = (), role: str = "") -> ast.Apply:
    """`apply METHOD(…) to "module", …`, or to a role, or to the whole input; settings of None are left out."""
    args = tuple(
        ast.Arg(ast.Name(name, span=NOWHERE), _value(name, given), span=NOWHERE)
        for name, given in settings.items()
        if given is not None
    )
    call = ast.Call(ast.Name(method, span=NOWHERE), args, span=NOWHERE)
    named = [_named(module) for module in modules]
    target = _together(named) if named else ast.Role(tuple(role.split(".")), span=NOWHERE) if role else None
    return ast.Apply(call, target, span=NOWHERE)


def trained(parameter: str) -> ast.Train:
    """`train "parameter"`."""
    return ast.Train(_named(parameter), span=NOWHERE)


def _together(items: list[ast.Selector]) -> ast.Selector:
    return items[0] if len(items) == 1 else ast.Union(tuple(items), span=NOWHERE)


def _named(name: str) -> ast.Selector:
    """A name that means itself."""
    if any(char in name for char in "*{},"):
        raise ValueError(f"{name!r} is no name of a module")
    return ast.Glob(name, span=NOWHERE)


def _value(name: str, given: Any) -> ast.Value:
    match given:
        case bool():
            return ast.Bool(given, span=NOWHERE)
        case int() | float():
            return ast.Number(given, span=NOWHERE)
        case str():
            return ast.String(given, span=NOWHERE)
    raise ValueError(f"{name} is {given!r}")
