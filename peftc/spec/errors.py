"""The mistakes a spec shows by itself once it is parsed: names, methods, parameters, quantities."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic, suggest
from peftc.diagnostics.source import Label, Span
from peftc.language import words


def _why(word: str) -> tuple[str, ...]:
    """What there is to know of a word that others use, as a note."""
    brought = words.meant(word)
    return (brought.why,) if brought and brought.why else ()


# --- names and methods ------------------------------------------------------------------------------------------------


class UnknownName(Diagnostic):
    """A name that nothing has; `later` is where a line below gives it."""

    name: str
    later: Span | None = None

    @property
    def title(self) -> str:
        return self.absence + (" before this line" if self.later else "")

    @property
    def absence(self) -> str:
        """The title of a name that no line gives."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        return "a name is defined above the lines that use it" if self.later else self.near

    @property
    def near(self) -> str:
        """What may be meant by a name that no line gives."""
        raise NotImplementedError

    @property
    def secondary(self) -> tuple[Label, ...]:
        return (Label(self.later, "defined only here"),) if self.later else ()

    @property
    def notes(self) -> tuple[str, ...]:
        return () if self.later else self.choice

    @property
    def choice(self) -> tuple[str, ...]:
        """What there is instead."""
        return ()


class UnknownMethod(UnknownName):
    code = "unknown-method"
    known: tuple[str, ...]
    noun: str = "method"
    is_a: str = ""

    @property
    def absence(self) -> str:
        return f"there is no {self.noun} '{self.name}'"

    @property
    def near(self) -> str:
        if self.is_a:
            return f"this is a {self.is_a}"
        brought = words.meant(self.name)
        return brought.label if brought else suggest(self.name, self.known) or ""

    @property
    def choice(self) -> tuple[str, ...]:
        near = None if self.span else self.near  # which stands at the caret, where there is one
        return (*_why(self.name), *([near] if near else []), f"{self.noun}s: {', '.join(self.known)}")


class UnknownParameter(Diagnostic):
    code = "unknown-parameter"
    method: str
    name: str
    takes: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.method} has no parameter '{self.name}'"

    @property
    def label(self) -> str:
        if here := words.parameter(self.name, self.names):
            return f"this is '{here}' here"
        brought = words.meant(self.name)
        return brought.label if brought else suggest(self.name, self.names) or ""

    @property
    def notes(self) -> tuple[str, ...]:
        takes = f"{self.method} takes: {', '.join(self.takes)}" if self.takes else f"{self.method} takes none"
        return (*_why(self.name), takes)


class PositionalArgument(Diagnostic):
    code = "positional-argument"
    method: str
    first: str | None

    @property
    def title(self) -> str:
        return f"the parameters of {self.method} are given by name"

    @property
    def label(self) -> str:
        return f"write {self.first}=…" if self.first else "it takes none"


class BadValue(Diagnostic):
    code = "bad-value"
    method: str
    name: str
    problem: str
    hint: str | None = None

    @property
    def title(self) -> str:
        return f"{self.name} of {self.method} {self.problem}"

    @property
    def label(self) -> str:
        return self.hint or ""


class ParametersConflict(Diagnostic):
    code = "parameters-conflict"
    method: str
    problem: str

    @property
    def title(self) -> str:
        return f"{self.method}: {self.problem}"


class MissingParameter(Diagnostic):
    code = "missing-parameter"
    method: str
    name: str
    expects: str

    @property
    def title(self) -> str:
        return f"{self.method} needs {self.name}"

    @property
    def label(self) -> str:
        return f"expects {self.expects}"


class GivenTwice(Diagnostic):
    """One parameter under its name and its alias."""

    code = "given-twice"
    method: str
    name: str
    first: Span

    @property
    def title(self) -> str:
        return f"{self.name} of {self.method} is given twice"

    @property
    def secondary(self) -> tuple[Label, ...]:
        return (Label(self.first, "first here"),)


class NameTaken(Diagnostic):
    code = "name-taken"
    name: str
    what: str
    first: Span | None = None

    @property
    def title(self) -> str:
        return f"'{self.name}' is already {self.what}"

    @property
    def secondary(self) -> tuple[Label, ...]:
        return (Label(self.first, "first here"),) if self.first else ()


class WrongKindOfName(Diagnostic):
    code = "wrong-kind-of-name"
    name: str
    is_a: str
    wanted: str
    defined: Span

    @property
    def title(self) -> str:
        return f"'{self.name}' names a {self.is_a}, and a {self.wanted} is wanted here"

    @property
    def secondary(self) -> tuple[Label, ...]:
        return (Label(self.defined, "defined here"),)


class UnknownRole(UnknownName):
    code = "unknown-role"
    known: tuple[str, ...]

    @property
    def absence(self) -> str:
        return f"there is no role or name '{self.name}'"

    @property
    def near(self) -> str:
        brought = words.meant(self.name)
        return (
            brought.label
            if brought
            else suggest(self.name, self.known) or f'for modules of this name: "**.{self.name}"'
        )

    @property
    def choice(self) -> tuple[str, ...]:
        return (
            *_why(self.name),
            f"roles: {', '.join(self.known)}",
            f'a module is named in quotation marks: "**.{self.name}", or whole: "model.layers.*.mlp.down_proj"',
        )


class UnknownStack(UnknownName):
    code = "unknown-stack"
    known: tuple[str, ...]

    @property
    def absence(self) -> str:
        return f"a model has no part called '{self.name}'"

    @property
    def near(self) -> str:
        return suggest(self.name, self.known) or f"one of {', '.join(self.known)}"


class UnknownGrouping(Diagnostic):
    code = "unknown-grouping"
    name: str
    known: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"layers cannot be grouped by '{self.name}'"

    @property
    def label(self) -> str:
        return suggest(self.name, self.known) or ""

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"groupings: {', '.join(self.known)}",)


class GroupsLayers(Diagnostic):
    """A grouping of anything but `layers`."""

    code = "groups-layers"
    name: str

    @property
    def title(self) -> str:
        return f"{self.name} groups the layers, all of them, and takes nothing else"

    @property
    def label(self) -> str:
        return f"write {self.name}(layers)"


class NoTarget(Diagnostic):
    code = "no-target"
    method: str
    hint: str

    @property
    def title(self) -> str:
        return f"{self.method} needs a place: apply {self.method} to SELECTOR"

    @property
    def label(self) -> str:
        return self.hint


class UnknownField(Diagnostic):
    code = "unknown-field"
    name: str
    known: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"sites have no '{self.name}' to compare"

    @property
    def label(self) -> str:
        return suggest(self.name, self.known) or f"one of {', '.join(self.known)}"


class NotANumber(Diagnostic):
    code = "not-a-number"
    name: str

    @property
    def title(self) -> str:
        return f"'{self.name}' is compared with a number"


class EmptySlice(Diagnostic):
    code = "bad-slice"
    title = "no model has layers in this slice: it ends where it starts, or before"
    notes = ("slices are Python's: layers[0], layers[:4], layers[-4:], layers[2:10:2]",)


class NamesTooDeep(Diagnostic):
    code = "too-deep"
    limit: int

    @property
    def title(self) -> str:
        return f"names within names, more than {self.limit} deep"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("join in one let what is spread over many, such as: let all = attn.*, mlp.*",)
