"""The mistakes that show in the text of a specification, in the order in which reading comes upon them.

Those in a single word are in `spelling.py`.
"""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic, choices
from peftc.diagnostics.source import Label, Span


class Hinted(Diagnostic):
    """A mistake whose remedy, if there is one, is known only where it is found."""

    hint: str | None = None

    @property
    def label(self) -> str:
        return self.hint or ""


# --- Statements ----------------------------------------------------------------------------------------------------


class Unexpected(Hinted):
    """The general syntax error: something else could stand here."""

    code = "syntax"
    expected: tuple[str, ...]
    found: str

    @property
    def title(self) -> str:
        return f"expected {choices(self.expected)}, found {self.found}"


class UnknownStatement(Hinted):
    code = "unknown-statement"
    found: str
    verbs: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"no statement starts with {self.found}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"statements start with {choices(self.verbs)}",)


class SeveralStatements(Diagnostic):
    code = "several-statements"
    label = "start a new line here"
    verb: str

    @property
    def title(self) -> str:
        return f"second statement on one line, '{self.verb}'"


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


class MissingSelector(Hinted):
    code = "missing-selector"
    notes = ('selectors are roles (attn.q, mlp.*), names ("model.layers.*.mlp"), /regular expressions/',)
    after: str
    found: str

    @property
    def title(self) -> str:
        return f"expected a selector after {self.after}, found {self.found}"


class TrailingComma(Diagnostic):
    code = "trailing-comma"
    title = "nothing follows the comma"
    label = "remove it, or put the list in brackets to go on in the next line"


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


class TooLong(Diagnostic):
    code = "too-long"
    limit: int

    @property
    def title(self) -> str:
        return f"word, string or pattern of more than {self.limit} characters"


class TooManyWords(Diagnostic):
    code = "too-many-words"
    limit: int

    @property
    def title(self) -> str:
        return f"more than {self.limit:,} words and signs in one specification, with all the files that it uses"

    @property
    def notes(self) -> tuple[str, ...]:
        return ('name many modules by one pattern or role, such as "layers.*.mlp" or mlp.*',)


# --- Parameters, slices, comparisons -------------------------------------------------------------------------------


class PositionalAfterKeyword(Diagnostic):
    code = "positional-after-keyword"
    title = "a parameter without a name follows one with a name"
    keyword: Span

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
    notes = ("slices are Python's: layers[0], layers[:4], layers[-4:], layers[2:10:2]",)
    reason: str

    @property
    def title(self) -> str:
        return f"bad slice: {self.reason}"


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


class UnknownOperator(Hinted):
    code = "unknown-operator"
    operator: str
    operators: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"'{self.operator}' does not compare here"

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"comparisons here: {' '.join(self.operators)}",)


class NestedTask(Diagnostic):
    code = "nested-task"
    title = "a task cannot stand inside a task"
    outer: Span

    @property
    def secondary(self) -> tuple[Label, ...]:
        return (Label(self.outer, "the outer task"),)


# --- Files ---------------------------------------------------------------------------------------------------------


class UnreadableFile(Diagnostic):
    """Missing, no regular file, not UTF-8, too large; `span` is the `use` that asked for it, if any."""

    code = "unreadable-file"
    path: str
    reason: str

    @property
    def title(self) -> str:
        return f"cannot read '{self.path}': {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        is_text = self.span is None and len(self.path.split()) > 1 and not self.path.endswith(".peft")
        return ("a spec is a file here: write its text into one; in Python text is taken, too",) if is_text else ()


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
    title = "files use one another in a circle"
    chain: tuple[str, ...]

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
