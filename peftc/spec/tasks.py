"""The tasks of a spec, each one of several adapters over one base; and the spec that each is by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from peftc import language as ast
from peftc.diagnostics.source import Source


def tasks_of(statements: tuple[ast.Statement, ...]) -> Iterator[ast.Task]:
    """Every task among statements and in what they include."""
    for statement in statements:
        match statement:
            case ast.Task():
                yield statement
            case ast.Use(spec=ast.Spec(statements=included)):
                yield from tasks_of(included)


def fits_of(statements: tuple[ast.Statement, ...]) -> Iterator[ast.Fit]:
    """Every `fit` among statements, in tasks and in what they include."""
    for statement in statements:
        match statement:
            case ast.Fit():
                yield statement
            case ast.Task(_, inside) | ast.Use(spec=ast.Spec(statements=inside)):
                yield from fits_of(inside)


def without_tasks(spec: ast.Spec) -> ast.Spec:
    """What all tasks of a spec have in common."""
    return ast.Spec(tuple(_shared(spec.statements)), spec.source, span=spec.span)


def of_task(spec: ast.Spec, task: ast.Task) -> ast.Spec:
    """What one task comes to: what all have in common, and behind it the task's own statements."""
    return ast.Spec((*_shared(spec.statements), *task.body), spec.source, span=spec.span)


def with_tasks(spec: ast.Spec, tasks: Iterable[ast.Task]) -> ast.Spec:
    """A spec with other tasks in place of its own."""
    return ast.Spec((*_shared(spec.statements), *tasks), spec.source, span=spec.span)


def task_from(name: str, statements: str) -> ast.Task:
    """A task from its name and the text of its statements.

    Raises:
        PeftcError: with what is wrong with the text, or with the name.
    """
    (task,) = ast.parse(Source(f"<task {name}>", f"task {name} {{\n{statements}\n}}")).statements
    assert isinstance(task, ast.Task)
    return task


def renamed(task: ast.Task, name: str) -> ast.Task:
    """The same task under another name."""
    return replace(task, name=task_from(name, "").name)


def _shared(statements: tuple[ast.Statement, ...]) -> Iterator[ast.Statement]:
    for statement in statements:
        match statement:
            case ast.Task():
                pass
            case ast.Use(spec=ast.Spec(statements=included)):
                yield from _shared(included)
            case _:
                yield statement
