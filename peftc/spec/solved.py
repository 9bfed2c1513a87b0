"""A spec whose `fit` statements were solved: ranks in place of `auto`, and what was chosen written out.

So nothing is solved twice: an artifact holds what was chosen, and reads back to the same model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from peftc import language as ast
from peftc.diagnostics.source import Source, Span
from peftc.spec.resolve import Intentions, resolve

N = TypeVar("N", bound=ast.Node)


def solved(wanted: Intentions, rank: int | None, chosen: Mapping[Span, tuple[str, ...]]) -> Intentions:
    """What a spec wants once its ranks are known; each `fit` is a `require`, and behind it what was chosen for it.

    Args:
        wanted: of the spec as it is.
        rank: what stands in place of `auto`; None leaves it.
        chosen: statements, by the place of the `fit`.

    Raises:
        PeftcError: where a method does not take that rank.
    """
    spec = _ranked(wanted.spec, rank, frozenset(wanted.automatic)) if rank is not None else wanted.spec
    return replace(resolve(_written(spec, chosen)), may_be_empty=wanted.may_be_empty)


def _written(spec: ast.Spec, chosen: Mapping[Span, tuple[str, ...]]) -> ast.Spec:
    return replace(spec, statements=tuple(_statements(spec.statements, chosen)))


def _statements(
    statements: tuple[ast.Statement, ...], chosen: Mapping[Span, tuple[str, ...]]
) -> Iterator[ast.Statement]:
    for statement in statements:
        match statement:
            case ast.Fit(quantity, op, value):
                yield ast.Require(quantity, op, value, span=statement.span)
                yield from _parsed(chosen.get(statement.span, ()), statement.span)
            case ast.Use(spec=ast.Spec() as used):
                yield replace(statement, spec=_written(used, chosen))
            case _:
                yield statement


def _parsed(lines: tuple[str, ...], fit: Span) -> tuple[ast.Statement, ...]:
    return ast.parse(Source(chosen_for(fit), "\n".join(lines))).statements


def chosen_for(fit: Span) -> str:
    """The name of the text that has the statements which a `fit` chose."""
    return f"chosen for line {fit.line} of {fit.source.name}"


def _ranked(node: N, rank: int, places: frozenset[Span]) -> N:
    """The same tree with a number at these places."""
    changed: dict[str, Any] = {}
    for field in fields(node):
        inside = getattr(node, field.name)
        if isinstance(inside, ast.Node):
            changed[field.name] = _at(inside, rank, places)
        elif isinstance(inside, tuple):
            changed[field.name] = tuple(_at(one, rank, places) if isinstance(one, ast.Node) else one for one in inside)
    return replace(node, **changed)


def _at(node: ast.Node, rank: int, places: frozenset[Span]) -> ast.Node:
    if isinstance(node, ast.Name) and node.span in places:
        return ast.Number(rank, span=node.span)
    return _ranked(node, rank, places)
