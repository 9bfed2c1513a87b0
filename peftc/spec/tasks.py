"""The tasks of a spec, each one of several adapters over one base; and the spec that each is by itself."""

from __future__ import annotations

from collections.abc import Iterator

from peftc import language as ast


def tasks_of(statements: tuple[ast.Statement, ...]) -> Iterator[ast.Task]:
    """Every task among statements and in what they include."""
    for statement in statements:
        match statement:
            case ast.Task():
                yield statement
            case ast.Use(spec=ast.Spec(statements=included)):
                yield from tasks_of(included)


def without_tasks(spec: ast.Spec) -> ast.Spec:
    """What all tasks of a spec have in common."""
    return ast.Spec(tuple(_shared(spec.statements)), spec.source, span=spec.span)


def of_task(spec: ast.Spec, task: ast.Task) -> ast.Spec:
    """What one task comes to: what all have in common, and behind it the task's own statements."""
    return ast.Spec((*_shared(spec.statements), *task.body), spec.source, span=spec.span)


def _shared(statements: tuple[ast.Statement, ...]) -> Iterator[ast.Statement]:
    for statement in statements:
        match statement:
            case ast.Task():
                pass
            case ast.Use(spec=ast.Spec(statements=included)):
                yield from _shared(included)
            case _:
                yield statement
