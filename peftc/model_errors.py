"""The mistakes that only show with a model at hand: capture, matching, attaching, budgets, artifacts.

The same small classes as in `errors.py`, in sections by the stage that finds them.
"""

from __future__ import annotations

from peftc.errors import Diagnostic, suggest
from peftc.text import Label, Span

# --- capture -----------------------------------------------------------------------------------------------------


class NeedsExample(Diagnostic):
    code = "needs-example"
    model: str

    @property
    def title(self) -> str:
        return f"{self.model} does not say what its inputs look like"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("pass example=<a tensor, a tuple, or a dict of keyword arguments>, with a batch of two or more",)


class CannotCapture(Diagnostic):
    code = "cannot-capture"
    model: str
    reason: str
    file: str | None
    line: int | None
    source: str | None

    @property
    def title(self) -> str:
        return f"{self.model} cannot be captured as a graph: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        where = (f"at {self.file}:{self.line}: {self.source}",) if self.file else ()
        return (*where, self.remedy)

    @property
    def remedy(self) -> str:
        """A branch on a value needs another remedy than a forward that fails by itself."""
        if "data-dependent" in self.reason:
            return (
                "torch.export needs a forward without branches on tensor values; replace the branch by torch.where "
                "or torch.cond, or pass an example= that avoids it"
            )
        return "its forward must run on the example inputs first: check the config, or pass other inputs as example="


# --- names and methods -------------------------------------------------------------------------------------------


class NotYet(Diagnostic):
    """Part of the language that this version parses and does not carry out."""

    code = "not-yet"
    what: str
    instead: str = ""

    @property
    def title(self) -> str:
        return f"{self.what} is part of the language, but this version of peftc cannot carry it out"

    @property
    def label(self) -> str:
        return self.instead


class UnknownMethod(Diagnostic):
    code = "unknown-method"
    name: str
    known: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"there is no method '{self.name}'"

    @property
    def label(self) -> str:
        return suggest(self.name, self.known) or ""

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"methods: {', '.join(self.known)}",)


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


# --- matching ----------------------------------------------------------------------------------------------------


class NoMatch(Diagnostic):
    code = "no-match"
    model: str
    near: tuple[str, ...]
    has: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"this matches nothing in {self.model}"

    @property
    def label(self) -> str:
        return f"nearest: {', '.join(self.near)}" if self.near else ""

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"it has: {', '.join(self.has)}",) if self.has else ()


class NoSuchStack(Diagnostic):
    code = "no-such-stack"
    model: str
    name: str
    stacks: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.model} has no {self.name}"

    @property
    def notes(self) -> tuple[str, ...]:
        if self.stacks:
            return (f"it has: {', '.join(self.stacks)}",)
        return ("its blocks stand in one stack: leave the filter out",)


class WrongSite(Diagnostic):
    code = "wrong-site"
    method: str
    wants: str
    site: str
    site_kind: str
    others: int

    @property
    def title(self) -> str:
        rest = f" and {self.others} more are not" if self.others else " is not"
        return f"{self.method} attaches to {self.wants}, which {self.site} ({self.site_kind}){rest}"


class Refused(Diagnostic):
    code = "refused"
    method: str
    site: str
    reason: str
    others: int

    @property
    def title(self) -> str:
        more = f" and {self.others} more" if self.others else ""
        return f"{self.method} cannot attach to {self.site}{more}: {self.reason}"


class SameMethodTwice(Diagnostic):
    code = "same-method-twice"
    method: str
    site: str
    others: int
    first: Span

    @property
    def title(self) -> str:
        more = f" and {self.others} more" if self.others else ""
        return f"{self.method} is applied twice to {self.site}{more}"

    @property
    def secondary(self) -> tuple[Label, ...]:
        return (Label(self.first, "first here"),)


class WeightClaimed(Diagnostic):
    """A weight that one method needs to itself, and another statement that changes it."""

    code = "weight-claimed"
    method: str
    site: str
    reason: str
    other: Span

    @property
    def title(self) -> str:
        return f"{self.method} needs the weight of {self.site} to itself: {self.reason}"

    @property
    def secondary(self) -> tuple[Label, ...]:
        return (Label(self.other, "changes it too"),)


class TrainsASlice(Diagnostic):
    code = "trains-a-slice"
    site: str
    weight: str

    @property
    def title(self) -> str:
        return f"{self.site} is a part of {self.weight}, which trains as a whole or not at all"

    @property
    def notes(self) -> tuple[str, ...]:
        return (f'train "{self.weight}" for all of it, or apply lora to this part',)


class TrainsTied(Diagnostic):
    code = "trains-tied"
    weight: str
    readers: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.weight} is tied to {' and '.join(self.readers)}: training it changes both"

    @property
    def label(self) -> str:
        return "name both to train them together"


# --- budgets -----------------------------------------------------------------------------------------------------


class OverBudget(Diagnostic):
    code = "over-budget"
    quantity: str
    found: str
    op: str
    limit: str
    breakdown: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.quantity} is {self.found}, and the spec requires {self.op} {self.limit}"

    @property
    def notes(self) -> tuple[str, ...]:
        return self.breakdown


class NothingTrains(Diagnostic):
    code = "nothing-trains"

    @property
    def title(self) -> str:
        return "nothing would train: the spec applies no method and trains no parameter"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("for example: apply lora(r=8) to attn.q, attn.v",)


# --- inside the compiler -----------------------------------------------------------------------------------------


class VerifierFailed(Diagnostic):
    code = "verifier-failed"
    pass_name: str
    reason: str

    @property
    def title(self) -> str:
        return f"peftc broke the graph in pass '{self.pass_name}': {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("this is a bug in peftc, not in the spec: please report it with the spec and the model's config",)


# --- using a compiled model --------------------------------------------------------------------------------------


class NeedsLabels(Diagnostic):
    code = "needs-labels"
    model: str

    @property
    def title(self) -> str:
        return f"{self.model} was compiled with labels, and makes its decoder's inputs from them"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("pass labels=, or compile with example={'input_ids': …, 'decoder_input_ids': …}",)


class CannotGenerate(Diagnostic):
    code = "cannot-generate"
    model: str

    @property
    def title(self) -> str:
        return f"{self.model} does not continue text: it has no token inputs or no logits"


class CannotMerge(Diagnostic):
    code = "cannot-merge"
    method: str
    reason: str

    @property
    def title(self) -> str:
        return f"{self.method} cannot be merged: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("save() keeps it beside the base model, which every method can do",)


# --- references and artifacts ------------------------------------------------------------------------------------


class BadReference(Diagnostic):
    code = "bad-reference"
    reference: str
    reason: str
    hint: str = ""

    @property
    def title(self) -> str:
        return f"cannot read a model from '{self.reference}': {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            *((f"for example: {self.hint}",) if self.hint else ()),
            "a model is a Hugging Face folder or id, a .gguf file, a config.json, or path/to/file.py:factory",
        )


class NoWeights(Diagnostic):
    code = "no-weights"
    reference: str

    @property
    def title(self) -> str:
        return f"'{self.reference}' is a bare config, which has no weights"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("peftc plan needs none; to compile, name the folder with the weights, or add --random-weights",)


class BadArtifact(Diagnostic):
    code = "bad-artifact"
    folder: str
    reason: str

    @property
    def title(self) -> str:
        return f"'{self.folder}' is not an artifact that can be used: {self.reason}"


class BadOutput(Diagnostic):
    code = "bad-output"
    folder: str

    @property
    def title(self) -> str:
        return f"'{self.folder}' is not empty, and is left alone: name another folder"


class WrongBase(Diagnostic):
    code = "wrong-base"
    folder: str
    reason: str

    @property
    def title(self) -> str:
        return f"'{self.folder}' does not fit this base model: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("pass the model it was made on: peftc.load(folder, model)",)


# --- show --------------------------------------------------------------------------------------------------------


class UnknownBlock(Diagnostic):
    code = "unknown-block"
    name: str
    model: str
    near: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.model} has no block '{self.name}'"

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"nearest: {', '.join(self.near)}",) if self.near else ("peftc sites lists the blocks of a model",)


class UnknownPass(Diagnostic):
    code = "unknown-pass"
    name: str
    known: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"there is no pass '{self.name}'"

    @property
    def notes(self) -> tuple[str, ...]:
        near = suggest(self.name, self.known)
        return (*((near,) if near else ()), f"the passes are: {', '.join(self.known)}")
