"""A spec as an editor has it, saved or not: what it says as far as it can be read, and all that is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from peftc import language as ast
from peftc.diagnostics.diagnostic import Diagnostic, PeftcError
from peftc.diagnostics.source import Label, Source, Span
from peftc.language.parse import read, read_file
from peftc.spec.check import understood
from peftc.spec.resolve import Intentions

UNNAMED = "untitled.peft"
Defining = ast.Let | ast.Group


@dataclass(frozen=True)
class Document:
    """`spec` has the good statements; `intentions` are what it wants where nothing is wrong."""

    source: Source
    spec: ast.Spec
    problems: tuple[Diagnostic, ...]
    intentions: Intentions | None

    def files(self) -> set[str]:
        """The files that it uses, resolved."""
        return {os.path.realpath(used.source.name) for _, used in _used(self.spec.statements)}

    def enclosing(self, offset: int) -> list[ast.Node]:
        """The nodes around a character of its own file, from the statement to the smallest."""
        found: list[ast.Node] = []
        inside: list[ast.Node] = [*self.spec.statements]
        while node := next((one for one in inside if self._is_at(one, offset)), None):
            found.append(node)
            inside = [*_parts(node)]
        return found

    def _is_at(self, node: ast.Node, offset: int) -> bool:
        return node.span.source is self.source and node.span.start <= offset <= node.span.end

    def definitions(self, offset: int) -> dict[str, Defining]:
        """What gives each name that a statement there may use, be it in a file that this one uses."""
        statements = self.spec.statements
        for statement in statements:
            if isinstance(statement, ast.Task) and self._is_at(statement, offset):
                statements += statement.body
        return dict(_defined(statements))


def look(text: str, path: Path | None, unsaved: Mapping[Path, str]) -> Document:
    """Reads a text, that of the file `path`; `unsaved`: what editors have of other files, by their resolved paths."""
    if path is None:
        reading = read(Source(UNNAMED, text))
    else:
        reading = read_file(path, unsaved={**unsaved, Path(os.path.realpath(path)): text})
    try:
        return Document(reading.spec.source, reading.spec, (), understood(reading))
    except PeftcError as error:
        return Document(reading.spec.source, reading.spec, error.diagnostics, None)


def own_place(document: Document, problem: Diagnostic) -> tuple[Span, tuple[Label, ...]]:
    """Where in its own file a document shows a diagnostic, and what places elsewhere belong to that.

    A mistake in a file that it uses stands at the line that does.
    """
    span = problem.span
    if span is None or span.source.name == document.source.name:
        return span or Span(document.source, 0, len(document.source.line(1))), problem.secondary
    uses = (use for use, used in _used(document.spec.statements) if used.source.name == span.source.name)
    use = next(uses, None)
    at = use.path.span if use else Span(document.source, 0, len(document.source.line(1)))
    return at, (Label(span, problem.title), *problem.secondary)


def words(problem: Diagnostic) -> str:
    """What a diagnostic says beside its place."""
    return "\n".join(filter(None, (problem.title, problem.label, *problem.notes)))


def _used(statements: tuple[ast.Statement, ...], by: ast.Use | None = None) -> Iterator[tuple[ast.Use, ast.Spec]]:
    """Every used file that could be read, and the statement of the first file that brings it."""
    for statement in statements:
        if isinstance(statement, ast.Use) and statement.spec:
            yield by or statement, statement.spec
            yield from _used(statement.spec.statements, by or statement)
        elif isinstance(statement, ast.Task):
            yield from _used(statement.body, by)


def _defined(statements: tuple[ast.Statement, ...]) -> Iterator[tuple[str, Defining]]:
    for statement in statements:
        match statement:
            case ast.Use(spec=ast.Spec(statements=used)):
                yield from _defined(used)
            case ast.Let(name):
                yield name.text, statement
            case ast.Group(names):
                yield from ((name.text, statement) for name in names)


def _parts(node: ast.Node) -> Iterator[ast.Node]:
    """The nodes that a node is made of."""
    for field in fields(node):
        value = getattr(node, field.name)
        yield from (one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, ast.Node))
