"""Every mistake a user can make, one small class each, in sections by the stage that finds it.

A class holds the facts of one mistake as fields and derives its words from them. `code` is stable, for
tools and for the golden files; the words may improve. Declaring a subclass of `Diagnostic` makes it a frozen,
keyword-only dataclass.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, dataclass_transform

from peftc.text import Label, Span, render


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """One mistake: where it is, what is wrong, and what would help."""

    code: ClassVar[str]
    span: Span | None = None

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

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


class PeftcError(Exception):
    """What peftc raises for a mistake of the user: all the diagnostics that could be found at once."""

    def __init__(self, *diagnostics: Diagnostic) -> None:
        super().__init__(*diagnostics)
        self.diagnostics = diagnostics

    def __str__(self) -> str:
        return "\n\n".join(map(render, self.diagnostics))


def suggest(word: str, candidates: Iterable[str]) -> str | None:
    """`did you mean 'rank'?` for the candidate nearest to a misspelt word, or None when none is near."""
    folded = {candidate.casefold(): candidate for candidate in candidates}
    near = difflib.get_close_matches(word.casefold(), folded, n=1)
    return f"did you mean '{folded[near[0]]}'?" if near else None


def choices(words: Sequence[str], last: str = "or") -> str:
    """`a, b or c`."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


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


def _named(character: str) -> str:
    """`U+00A0 NO-BREAK SPACE`, for characters that one cannot see or tell apart."""
    return f"U+{ord(character):04X} {unicodedata.name(character, 'control character')}"


# ---- Characters and words (syntax.py) ----------------------------------------------------------------------


class BadCharacter(Diagnostic):
    """A character that no word of the language has; `meant` is the one it looks like or stands for."""

    code = "bad-character"
    character: str
    meant: str | None = None
    hint: str = ""

    @property
    def title(self) -> str:
        if self.character.isascii() and self.character.isprintable():
            return f"unexpected character '{self.character}'"
        return f"unexpected character {_named(self.character)}"

    @property
    def label(self) -> str:
        if self.meant is None:
            return self.hint
        return "use an ordinary space" if self.meant == " " else f"did you mean '{self.meant}'?"


class BadName(Diagnostic):
    """A word with letters other than ASCII ones, often a look-alike from another alphabet."""

    code = "bad-name"
    word: str
    character: str
    meant: str | None = None

    @property
    def title(self) -> str:
        return f"'{self.word}' has the character {_named(self.character)}"

    @property
    def label(self) -> str:
        return f"did you mean '{self.meant}'?" if self.meant else ""

    @property
    def notes(self) -> tuple[str, ...]:
        return ("names have ASCII letters, digits and '_'; module names with others go in double quotes",)


class UnclosedString(Diagnostic):
    code = "unclosed-string"

    @property
    def title(self) -> str:
        return "string is never closed"

    @property
    def label(self) -> str:
        return "no '\"' up to the end of the line"


class WrongQuote(Diagnostic):
    code = "wrong-quote"
    text: str

    @property
    def title(self) -> str:
        return "strings stand in double quotes"

    @property
    def label(self) -> str:
        return f"""write "{self.text.strip("'")}\""""


class BadEscape(Diagnostic):
    code = "bad-escape"
    escape: str

    @property
    def title(self) -> str:
        return f"unknown escape '{self.escape}' in a string"

    @property
    def notes(self) -> tuple[str, ...]:
        return (r"""escapes are \\ \" \n \r \t and \uXXXX""",)


class UnclosedRegex(Diagnostic):
    code = "unclosed-regular-expression"
    comment: bool = False

    @property
    def title(self) -> str:
        return "regular expression is empty" if self.comment else "regular expression is never closed"

    @property
    def label(self) -> str:
        return "a comment starts with '#'" if self.comment else "no '/' up to the end of the line"


class BadRegex(Diagnostic):
    code = "bad-regular-expression"
    reason: str

    @property
    def title(self) -> str:
        return f"bad regular expression: {self.reason}"


class BadGlob(Diagnostic):
    code = "bad-name-pattern"
    reason: str

    @property
    def title(self) -> str:
        return f"bad name pattern: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("in name patterns '*' is one segment, '**' any number of segments, '{a,b}' a choice",)


class BadRole(Diagnostic):
    """A dotted word that cannot be a role: digits or '*' inside, an empty part."""

    code = "bad-role"
    text: str

    @property
    def title(self) -> str:
        return f"'{self.text}' is not a role"

    @property
    def label(self) -> str:
        names = "**" if self.text == "*" else self.text.strip(".")
        return f'for module names write "{names}"'

    @property
    def notes(self) -> tuple[str, ...]:
        return ("roles are dotted words such as attn.q or mlp.*, with '*' last if at all",)


class BadNumber(Diagnostic):
    code = "bad-number"
    text: str

    @property
    def title(self) -> str:
        return f"'{self.text}' is not a number"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("numbers look like 8, -4, 1_000, 0.05, 1e-5, 1%, 24 GiB",)


class UnknownUnit(Diagnostic):
    code = "unknown-unit"
    unit: str
    hint: str | None = None
    units: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"unknown unit '{self.unit}'"

    @property
    def label(self) -> str:
        return self.hint or ""

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"units are {choices(self.units, 'and')}",)


class NumberTooLarge(Diagnostic):
    code = "number-too-large"

    @property
    def title(self) -> str:
        return "number is too large"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("whole numbers reach to 2**63 - 1, others to 1.8e308",)


# ---- Statements (syntax.py) --------------------------------------------------------------------------------


class Unexpected(Diagnostic):
    """The general syntax error: something else could stand here."""

    code = "syntax"
    expected: tuple[str, ...]
    found: str
    hint: str | None = None

    @property
    def title(self) -> str:
        return f"expected {choices(self.expected)}, found {self.found}"

    @property
    def label(self) -> str:
        return self.hint or ""


class UnknownStatement(Diagnostic):
    code = "unknown-statement"
    found: str
    hint: str | None = None
    verbs: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"no statement starts with {self.found}"

    @property
    def label(self) -> str:
        return self.hint or ""

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"statements start with {choices(self.verbs)}",)


class SeveralStatements(Diagnostic):
    code = "several-statements"
    verb: str

    @property
    def title(self) -> str:
        return f"second statement on one line, '{self.verb}'"

    @property
    def label(self) -> str:
        return "start a new line here"


class MissingWord(Diagnostic):
    """`to` or `with` left out."""

    code = "missing-word"
    word: str
    before: str

    @property
    def title(self) -> str:
        return f"'{self.word}' is missing before {self.before}"

    @property
    def label(self) -> str:
        return f"write '{self.word}' before this"


class MissingValue(Diagnostic):
    code = "missing-value"
    name: str

    @property
    def title(self) -> str:
        return f"'{self.name}=' has no value"


class MissingSelector(Diagnostic):
    code = "missing-selector"
    after: str
    found: str
    hint: str | None = None

    @property
    def title(self) -> str:
        return f"expected a selector after {self.after}, found {self.found}"

    @property
    def label(self) -> str:
        return self.hint or ""

    @property
    def notes(self) -> tuple[str, ...]:
        return ('selectors are roles (attn.q, mlp.*), names ("model.layers.*.mlp"), /regular expressions/',)


class TrailingComma(Diagnostic):
    code = "trailing-comma"

    @property
    def title(self) -> str:
        return "nothing follows the comma"

    @property
    def label(self) -> str:
        return "remove it, or put the list in brackets to go on in the next line"


class ReservedName(Diagnostic):
    code = "reserved-name"
    word: str

    @property
    def title(self) -> str:
        return f"'{self.word}' is a word of the language and cannot be a name"


class UnclosedBracket(Diagnostic):
    """`found` is the place where reading went no further, if it is not the end of the file."""

    code = "unclosed-bracket"
    bracket: str
    wanted: str
    found: Span | None = None

    @property
    def title(self) -> str:
        return f"'{self.bracket}' is never closed"

    @property
    def secondary(self) -> tuple[Label, ...]:
        return (Label(self.found, f"expected '{self.wanted}' before this"),) if self.found else ()


class UnopenedBracket(Diagnostic):
    code = "unopened-bracket"
    bracket: str

    @property
    def title(self) -> str:
        return f"'{self.bracket}' closes nothing"


class MismatchedBracket(Diagnostic):
    code = "mismatched-bracket"
    bracket: str
    opening: Span
    wanted: str

    @property
    def title(self) -> str:
        return f"'{self.bracket}' cannot close '{self.opening.text}'"

    @property
    def label(self) -> str:
        return f"expected '{self.wanted}'"

    @property
    def secondary(self) -> tuple[Label, ...]:
        return (Label(self.opening, "opened here"),)


class TooDeep(Diagnostic):
    code = "nested-too-deep"
    limit: int

    @property
    def title(self) -> str:
        return f"nested more than {self.limit} deep"


class TooManyMistakes(Diagnostic):
    code = "too-many-mistakes"
    limit: int

    @property
    def title(self) -> str:
        return f"reading stopped after {self.limit} mistakes"


# ---- Parameters, slices, comparisons (syntax.py) -----------------------------------------------------------


class PositionalAfterKeyword(Diagnostic):
    code = "positional-after-keyword"
    keyword: Span

    @property
    def title(self) -> str:
        return "a parameter without a name follows one with a name"

    @property
    def secondary(self) -> tuple[Label, ...]:
        return (Label(self.keyword, "named parameter"),)


class DuplicateArgument(Diagnostic):
    code = "duplicate-parameter"
    name: str
    first: Span

    @property
    def title(self) -> str:
        return f"parameter '{self.name}' is given twice"

    @property
    def secondary(self) -> tuple[Label, ...]:
        return (Label(self.first, "given first here"),)


class BadSlice(Diagnostic):
    code = "bad-slice"
    reason: str

    @property
    def title(self) -> str:
        return f"bad slice: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("slices are Python's: layers[0], layers[:4], layers[-4:], layers[2:10:2]",)


class SlicedGroup(Diagnostic):
    """Square brackets after a word other than `layers`, or `layers` without them."""

    code = "bad-layers"
    name: str

    @property
    def title(self) -> str:
        return "'in layers' needs a slice" if self.name == "layers" else f"'{self.name}' cannot be sliced"

    @property
    def label(self) -> str:
        return "write layers[a:b]" if self.name == "layers" else "only layers can: layers[a:b]"


class UnknownOperator(Diagnostic):
    code = "unknown-operator"
    operator: str
    hint: str | None = None
    operators: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"'{self.operator}' does not compare here"

    @property
    def label(self) -> str:
        return self.hint or ""

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"comparisons here: {' '.join(self.operators)}",)


class NestedTask(Diagnostic):
    code = "nested-task"
    outer: Span

    @property
    def title(self) -> str:
        return "a task cannot stand inside a task"

    @property
    def secondary(self) -> tuple[Label, ...]:
        return (Label(self.outer, "the outer task"),)


# ---- Files (syntax.py) -------------------------------------------------------------------------------------


class UnreadableFile(Diagnostic):
    """Missing, no regular file, not UTF-8, too large; `span` is the `use` that asked for it, if any."""

    code = "unreadable-file"
    path: str
    reason: str

    @property
    def title(self) -> str:
        return f"cannot read '{self.path}': {self.reason}"


class UseEscapes(Diagnostic):
    code = "use-outside"
    path: str
    folders: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"'{self.path}' lies outside the folders that may be used"

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"allowed: {', '.join(self.folders)}",)


class UseCycle(Diagnostic):
    code = "use-cycle"
    chain: tuple[str, ...]

    @property
    def title(self) -> str:
        return "files use one another in a circle"

    @property
    def notes(self) -> tuple[str, ...]:
        return (" uses ".join(self.chain),)


class TooManyFiles(Diagnostic):
    code = "too-many-files"
    limit: int

    @property
    def title(self) -> str:
        return f"more than {self.limit} files are used"


class UseWithoutFile(Diagnostic):
    """`use` in a text that comes from no file."""

    code = "use-without-file"
    path: str

    @property
    def title(self) -> str:
        return f"'{self.path}' cannot be found from a text that is no file"


# ---- Sites (sites.py) --------------------------------------------------------------------------------------
# ---- Plan (plan.py) ----------------------------------------------------------------------------------------
# ---- Capture (capture.py) ----------------------------------------------------------------------------------
# ---- Artifacts (checkpoint.py) -----------------------------------------------------------------------------
