"""The mistakes a spec shows by itself once it is parsed: names, methods, parameters, quantities."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic, suggest
from peftc.diagnostics.source import Label, Span

# --- names and methods ------------------------------------------------------------------------------------------------


class UnknownMethod(Diagnostic):
    code = "unknown-method"
    name: str
    known: tuple[str, ...]
    noun: str = "method"
    is_a: str = ""

    @property
    def title(self) -> str:
        return f"there is no {self.noun} '{self.name}'"

    @property
    def label(self) -> str:
        return f"this is a {self.is_a}" if self.is_a else suggest(self.name, self.known) or ""

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"{self.noun}s: {', '.join(self.known)}",)


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
        return suggest(self.name, self.names) or ""

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"{self.method} takes: {', '.join(self.takes)}" if self.takes else f"{self.method} takes none",)


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


class UnknownRole(Diagnostic):
    code = "unknown-role"
    name: str
    known: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"there is no role or name '{self.name}'"

    @property
    def label(self) -> str:
        return suggest(self.name, self.known) or ""

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            f"roles: {', '.join(self.known)}",
            'a module is named in quotation marks: "model.layers.*.mlp.down_proj"',
        )


class UnknownStack(Diagnostic):
    code = "unknown-stack"
    name: str
    known: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"a model has no part called '{self.name}'"

    @property
    def label(self) -> str:
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


class UnknownQuantity(Diagnostic):
    code = "unknown-quantity"
    name: str
    known: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"'{self.name}' is nothing that can be required"

    @property
    def label(self) -> str:
        return suggest(self.name, self.known) or f"one of {', '.join(self.known)}"


class WrongUnit(Diagnostic):
    code = "wrong-unit"
    quantity: str
    expects: str

    @property
    def title(self) -> str:
        return f"{self.quantity} is compared with {self.expects}"


class EmptyBudget(Diagnostic):
    code = "empty-budget"
    quantity: str
    bound: str

    @property
    def title(self) -> str:
        return f"whatever the model, this says the same of {self.quantity}: {self.bound}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("give a limit that one model keeps and another does not, or leave the line out",)


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
