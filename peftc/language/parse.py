"""A text or a file to its syntax tree, or to all of its mistakes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lark import Tree

import peftc.language.errors as mistakes
from peftc.diagnostics import reading as files
from peftc.diagnostics.diagnostic import Diagnostic, PeftcError
from peftc.diagnostics.source import Source, Span
from peftc.language.build import Builder
from peftc.language.reader import MOST_WORDS, Reader
from peftc.language.tree import Spec, Statement, String, Task, Use

LARGEST_FILE = 1 << 20  # bytes
MOST_FILES = 100
DEEPEST_USE = 16


@dataclass(frozen=True)
class Reading:
    """What a text says as far as it could be read: the good statements, and all that is wrong with the others.

    `lost`: what a name stands for may be in a statement, or a file, that could not be read; None stands for any name.
    """

    spec: Spec
    problems: tuple[Diagnostic, ...] = ()
    lost: frozenset[str | None] = frozenset()

    def whole(self) -> Spec:
        """The specification. Raises `PeftcError` with every mistake, if there are any."""
        if self.problems:
            raise PeftcError(*self.problems)
        return self.spec


def parse(source: Source) -> Spec:
    """The specification in a text; `use` is not followed. Raises `PeftcError` with every mistake found."""
    return read(source).whole()


def read(source: Source) -> Reading:
    """The same, with what could be read of a text that has mistakes."""
    return _parse(source, MOST_WORDS)[0]


def _parse(source: Source, most: int) -> tuple[Reading, int]:
    """What could be read, and how many of `most` words were taken."""
    reader = Reader(source, most)
    builder = Builder(source)
    statements = []
    for tree in reader.read().children:
        before = len(builder.problems)
        statement = builder.statement(tree) if isinstance(tree, Tree) else None
        if statement is not None and len(builder.problems) == before:  # else it has a stand-in somewhere
            statements.append(statement)
    problems = sorted(reader.problems + builder.problems, key=lambda problem: problem.span.start if problem.span else 0)
    spec = Spec(tuple(statements), source, span=Span(source, 0, len(source.text)))
    return Reading(spec, tuple(problems), reader.defined() if problems else frozenset()), reader.count


def source_of(path: str | Path) -> Source:
    """A file's text. Raises `PeftcError` where it cannot be read."""
    return _readable(str(path), _text(Path(path)))


def decoded(name: str, content: bytes) -> Source:
    """The same of bytes that are no file's."""
    return _readable(name, _decoded(content))


def _readable(name: str, text: str | _Unreadable) -> Source:
    if isinstance(text, _Unreadable):
        raise PeftcError(mistakes.UnreadableFile(path=name, reason=text.reason))
    return Source(name, text)


def parse_file(path: str | Path, *, roots: Iterable[str | Path] = ()) -> Spec:
    """The specification in a file, and in the files it uses (`Use.spec`).

    A used file is found relative to the file that names it, and must lie, symbolic links resolved, below the
    folder of `path` or one of `roots`. Raises `PeftcError` with every mistake of every file.
    """
    return read_file(path, roots=roots).whole()


def read_file(
    path: str | Path, *, roots: Iterable[str | Path] = (), unsaved: Mapping[Path, str] | None = None
) -> Reading:
    """The same, with what could be read of files that have mistakes; `unsaved`: texts in place of files, resolved."""
    reader = _Files(tuple(Path(os.path.realpath(folder)) for folder in (Path(path).parent, *roots)), unsaved or {})
    spec = reader.read(Path(path), str(path), None)
    problems = tuple(dict.fromkeys(reader.problems))  # two files may use the same bad one
    return Reading(
        spec or Spec((), Source(str(path), ""), span=Span(Source(str(path), ""), 0, 0)),
        problems,
        frozenset(reader.lost),
    )


class _Files:
    """Reads a file and what it uses, depth first."""

    def __init__(self, folders: tuple[Path, ...], unsaved: Mapping[Path, str]) -> None:
        self.folders = folders
        self.unsaved = unsaved
        self.problems: list[Diagnostic] = []
        self.chain: list[Path] = []  # the files being read, resolved
        self.count = 0
        self.words = MOST_WORDS  # that are left
        self.lost: set[str | None] = set()  # names, see `Reading`

    def read(self, path: Path, name: str, asked: Span | None) -> Spec | None:
        self.count += 1
        if self.count > MOST_FILES or len(self.chain) > DEEPEST_USE:
            limit = MOST_FILES if self.count > MOST_FILES else DEEPEST_USE
            self.problems.append(mistakes.TooManyFiles(limit=limit, span=asked))
            return None
        unsaved = self.unsaved.get(Path(os.path.realpath(path))) if self.unsaved else None
        text = _text(path) if unsaved is None else unsaved
        if isinstance(text, _Unreadable):
            self.problems.append(mistakes.UnreadableFile(path=name, reason=text.reason, span=asked))
            return None
        reading, words = _parse(Source(name, text), self.words)
        self.words = max(self.words - words, 0)
        self.problems += reading.problems
        self.lost |= reading.lost
        self.chain.append(path.resolve())
        spec = replace(reading.spec, statements=self._follow(reading.spec.statements, Path(name).parent))
        self.chain.pop()
        return spec

    def _follow(self, statements: Sequence[Statement], folder: Path) -> tuple[Statement, ...]:
        """The statements with the files they use read."""
        followed: list[Statement] = []
        for statement in statements:
            if isinstance(statement, Use):
                used = self._use(statement.path, folder)
                if used is None:
                    self.lost.add(None)
                    continue
                statement = replace(statement, spec=used)
            elif isinstance(statement, Task):
                statement = replace(statement, body=self._follow(statement.body, folder))
            followed.append(statement)
        return tuple(followed)

    def _use(self, path: String, folder: Path) -> Spec | None:
        try:
            target = (folder / path.value).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            self.problems.append(mistakes.UnreadableFile(path=path.value, reason=_reason(error), span=path.span))
            return None
        if not any(target.is_relative_to(allowed) for allowed in self.folders):
            allowed = tuple(map(str, self.folders))
            self.problems.append(mistakes.UseEscapes(path=path.value, folders=allowed, span=path.span))
            return None
        if target in self.chain:
            chain = tuple(file.name for file in (*self.chain[self.chain.index(target) :], target))
            self.problems.append(mistakes.UseCycle(chain=chain, span=path.span))
            return None
        return self.read(target, str(folder / path.value), path.span)


@dataclass(frozen=True)
class _Unreadable:
    reason: str


def _text(path: Path) -> str | _Unreadable:
    try:
        return _decoded(files.read_file(path, LARGEST_FILE))
    except (OSError, ValueError) as error:
        return _Unreadable(_reason(error))


def _decoded(content: bytes) -> str | _Unreadable:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return _Unreadable(f"it is not UTF-8 (byte {error.start}, line {line})")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
