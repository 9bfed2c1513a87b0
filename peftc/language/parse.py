"""A text or a file to its syntax tree, or to all of its mistakes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lark import Tree

import peftc.language.errors as mistakes
from peftc.diagnostics.diagnostic import Diagnostic, PeftcError
from peftc.diagnostics.reading import read_file
from peftc.diagnostics.source import Source, Span
from peftc.language.build import Builder
from peftc.language.reader import MOST_WORDS, Reader
from peftc.language.tree import Spec, Statement, String, Task, Use

LARGEST_FILE = 1 << 20  # bytes
MOST_FILES = 100
DEEPEST_USE = 16


def parse(source: Source) -> Spec:
    """The specification in a text; `use` is not followed. Raises `PeftcError` with every mistake found."""
    spec, problems, _ = _parse(source, MOST_WORDS)
    if problems:
        raise PeftcError(*problems)
    return spec


def _parse(source: Source, most: int) -> tuple[Spec, list[Diagnostic], int]:
    """What could be read, the mistakes in the order of the text, and how many of `most` words were taken."""
    reader = Reader(source, most)
    builder = Builder(source)
    statements = tuple(builder.statement(tree) for tree in reader.read().children if isinstance(tree, Tree))
    problems = sorted(reader.problems + builder.problems, key=lambda problem: problem.span.start if problem.span else 0)
    return Spec(statements, source, span=Span(source, 0, len(source.text))), problems, reader.count


def parse_file(path: str | Path, *, roots: Iterable[str | Path] = ()) -> Spec:
    """The specification in a file, and in the files it uses (`Use.spec`).

    A used file is found relative to the file that names it, and must lie, symbolic links resolved, below the
    folder of `path` or one of `roots`. Raises `PeftcError` with every mistake of every file.
    """
    reader = _Files(tuple(Path(os.path.realpath(folder)) for folder in (Path(path).parent, *roots)))
    spec = reader.read(Path(path), str(path), None)
    if reader.problems:
        raise PeftcError(*dict.fromkeys(reader.problems))  # two files may use the same bad one
    assert spec is not None  # or there were problems
    return spec


class _Files:
    """Reads a file and what it uses, depth first."""

    def __init__(self, folders: tuple[Path, ...]) -> None:
        self.folders = folders
        self.problems: list[Diagnostic] = []
        self.chain: list[Path] = []  # the files being read, resolved
        self.count = 0
        self.words = MOST_WORDS  # that are left

    def read(self, path: Path, name: str, asked: Span | None) -> Spec | None:
        self.count += 1
        if self.count > MOST_FILES or len(self.chain) > DEEPEST_USE:
            limit = MOST_FILES if self.count > MOST_FILES else DEEPEST_USE
            self.problems.append(mistakes.TooManyFiles(limit=limit, span=asked))
            return None
        text = _text(path)
        if isinstance(text, _Unreadable):
            self.problems.append(mistakes.UnreadableFile(path=name, reason=text.reason, span=asked))
            return None
        spec, problems, words = _parse(Source(name, text), self.words)
        self.words = max(self.words - words, 0)
        self.problems += problems
        self.chain.append(path.resolve())
        spec = replace(spec, statements=self._follow(spec.statements, Path(name).parent))
        self.chain.pop()
        return spec

    def _follow(self, statements: Sequence[Statement], folder: Path) -> tuple[Statement, ...]:
        """The statements with the files they use read."""
        followed: list[Statement] = []
        for statement in statements:
            if isinstance(statement, Use):
                statement = replace(statement, spec=self._use(statement.path, folder))
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
        content = read_file(path, LARGEST_FILE)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return _Unreadable(f"it is not UTF-8 (byte {error.start}, line {line})")
    except (OSError, ValueError) as error:
        return _Unreadable(_reason(error))


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
