"""What a diagnostic is: a mistake that a user can make, one small class each, in the `errors.py` of who finds it.

A class holds the facts of one mistake as fields and derives its words from them. `code` is stable, for
tools and for the golden files; the words may improve. A subclass of `Diagnostic` is a frozen, keyword-only dataclass;
it is made one when there is the first of it, as of hundreds few are ever told, and making one takes a millisecond.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, dataclass_transform

from peftc.diagnostics.render import render, render_all
from peftc.diagnostics.source import Label, Span


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """One mistake: where it is, what is wrong, and what would help."""

    code: ClassVar[str]
    span: Span | None = None

    def __new__(cls, **_facts: Any) -> Self:
        for each in reversed(cls.__mro__):  # those that it is derived from first
            if issubclass(each, Diagnostic) and "__dataclass_params__" not in vars(each):
                dataclass(frozen=True, kw_only=True)(each)
        return super().__new__(cls)

    @property
    def title(self) -> str:
        """The headline: what is wrong, without an article or a full stop."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """Words at the caret, usually the remedy."""
        return ""

    @property
    def secondary(self) -> tuple[Label, ...]:
        """Other places that matter, in this file or another."""
        return ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines below the excerpt."""
        return ()

    def __str__(self) -> str:
        return render(self)

    def to_json(self) -> dict[str, Any]:
        """The diagnostic as plain data; lines and columns count from 1, and the end is exclusive."""
        return {
            "code": self.code,
            "title": self.title,
            **_place(self.span),
            "label": self.label,
            "notes": list(self.notes),
            "secondary": [{**_place(label.span), "label": label.text} for label in self.secondary],
        }


MOST_MISTAKES = 100  # that are told at once, by whatever stage


class TooManyMistakes(Diagnostic):
    """Stands behind the last one that is told."""

    code = "too-many-mistakes"
    limit: int

    @property
    def title(self) -> str:
        return f"these are the first {self.limit} mistakes, and there are more"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("mend these first: others often follow from them",)


class PeftcError(Exception):
    """What peftc raises for a mistake of the user: all the diagnostics that could be found at once, if not too many."""

    def __init__(self, *diagnostics: Diagnostic) -> None:
        if len(diagnostics) > MOST_MISTAKES:
            told = diagnostics[:MOST_MISTAKES]
            diagnostics = (*told, TooManyMistakes(limit=MOST_MISTAKES, span=told[-1].span))
        super().__init__(*diagnostics)
        self.diagnostics = diagnostics

    def __str__(self) -> str:
        return render_all(self.diagnostics)


def in_file_order(problems: Iterable[Diagnostic]) -> list[Diagnostic]:
    """By place in the text; files in the order in which something in them was found, what has no place first."""
    found = list(problems)
    files = {file: index for index, file in enumerate(dict.fromkeys(p.span.source.name for p in found if p.span))}
    return sorted(found, key=lambda p: (files[p.span.source.name], p.span.start) if p.span else (-1, 0))


def suggest(word: str, candidates: Iterable[str]) -> str | None:
    """`did you mean 'rank'?` for the candidate nearest to a misspelt word, or None when none is near."""
    folded = {candidate.casefold(): candidate for candidate in candidates}
    near = difflib.get_close_matches(word.casefold(), folded, n=3)
    near.sort(key=lambda one: sorted(one) != sorted(word.casefold()))  # letters that changed places come first
    return f"did you mean '{folded[near[0]]}'?" if near else None


def choices(words: Sequence[str], last: str = "or") -> str:
    """`a, b or c`."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def among(name: str, others: int) -> str:
    """`a`, or `a and 3 more`."""
    return f"{name} and {others} more" if others else name


def listed(names: Sequence[str], most: int = 12) -> str:
    """`a, b, c and 3 more`: as many by name as can be read."""
    return among(", ".join(names[:most]), max(0, len(names) - most))


def _place(span: Span | None) -> dict[str, str | int | None]:
    if span is None:
        return dict.fromkeys(("file", "line", "column", "end_line", "end_column"))
    return {
        "file": span.source.name,
        "line": span.line,
        "column": span.column,
        "end_line": span.end_line,
        "end_column": span.end_column,
    }
