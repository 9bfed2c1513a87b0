"""The mistakes that only show with a model at hand: matching, attaching, budgets."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic, among, choices
from peftc.diagnostics.source import Label, Span

SHOWN = 2  # of equal notes


class NoMatch(Diagnostic):
    code = "no-match"
    model: str
    near: tuple[str, ...]
    has: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    instead: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"this matches nothing in {self.model}"

    @property
    def label(self) -> str:
        if self.instead:
            return f"write {choices(self.instead)}"
        return f"nearest: {', '.join(self.near)}" if self.near else ""

    @property
    def notes(self) -> tuple[str, ...]:
        more = len(self.absent) - SHOWN
        rest = (f"and {more} more, which `peftc sites` lists",) if more > 0 else ()
        return (*((f"it has: {', '.join(self.has)}",) if self.has else ()), *self.absent[:SHOWN], *rest)


class SlowPattern(Diagnostic):
    code = "slow-pattern"
    seconds: float

    @property
    def title(self) -> str:
        return f"matching this takes too long: all patterns of a spec have {self.seconds:g} s together"

    @property
    def notes(self) -> tuple[str, ...]:
        return ('repeats in repeats, such as (a+)+, do that; a name pattern in quotes never does: "**.q_proj"',)


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


class FewerLayersThanGroups(Diagnostic):
    code = "fewer-layers-than-groups"
    model: str
    stack: str | None
    layers: int
    groups: int
    defined: Span

    @property
    def title(self) -> str:
        place = f"the {self.stack} of {self.model}" if self.stack else self.model
        return f"{place} has {self.layers} layers, too few for {self.groups} groups"

    @property
    def secondary(self) -> tuple[Label, ...]:
        return (Label(self.defined, "one of the groups"),)


class WrongSite(Diagnostic):
    code = "wrong-site"
    method: str
    wants: str
    site: str
    site_kind: str
    others: int
    instead: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        rest = f" and {self.others} more are not" if self.others else " is not"
        return f"{self.method} attaches to {self.wants}, which {self.site} ({self.site_kind}){rest}"

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.instead:
            return ()
        return (f"{choices(self.instead)} can; or leave the experts out with 'except expert'",)


class NoSequence(Diagnostic):
    code = "no-sequence"
    method: str
    model: str

    @property
    def title(self) -> str:
        return f"{self.method} goes into the model's input sequence, and {self.model} has none that could be found"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("a sequence is made of tokens looked up in a table, or enters the first of several equal blocks",)


class Refused(Diagnostic):
    code = "refused"
    method: str
    site: str
    reason: str
    others: int

    @property
    def title(self) -> str:
        return f"{self.method} cannot attach to {among(self.site, self.others)}: {self.reason}"


class NoPositions(Diagnostic):
    code = "no-positions"
    taken: int
    positions: int

    @property
    def title(self) -> str:
        return f"{self.taken} of the model's {self.positions} positions are taken, and none is left for the input"


class TakesNoTarget(Diagnostic):
    """A sequence method that is sent to a layer."""

    code = "takes-no-target"
    method: str
    label = "leave this out"

    @property
    def title(self) -> str:
        return f"{self.method} goes into the model's whole input, and attaches to no part of it"


class SameMethodTwice(Diagnostic):
    code = "same-method-twice"
    method: str
    site: str
    others: int
    first: Span

    @property
    def title(self) -> str:
        return f"{self.method} is applied twice to {among(self.site, self.others)}"

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


class GradientClaimed(Diagnostic):
    """Something that learns below a method through which no gradient passes."""

    code = "gradient-claimed"
    method: str
    reason: str
    other: Span

    @property
    def title(self) -> str:
        return f"{self.method} keeps the gradient from what it stands on: {self.reason}"

    @property
    def secondary(self) -> tuple[Label, ...]:
        return (Label(self.other, "would never learn"),)

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"leave one of them out, or keep to what stands behind {self.method}, such as the head",)


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
    trains: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{choices(self.trains, 'and')} is one tensor with {choices(self.missing, 'and')}, which would train too"

    @property
    def label(self) -> str:
        return "name all of them to train them together"


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


class CannotFit(Diagnostic):
    """Everything that a `fit` may choose is too little."""

    code = "cannot-fit"
    quantity: str
    least: str
    op: str
    limit: str
    tried: str
    smallest: str
    advice: tuple[str, ...] = ()
    breakdown: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.quantity} is {self.least} {self.tried}, and the spec wants {self.op} {self.limit}"

    @property
    def label(self) -> str:
        return f"the smallest that fits: {self.smallest}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.breakdown, *self.advice)


class NothingTrains(Diagnostic):
    """Points at the end of the spec, where what is missing may stand, or at the task that has nothing."""

    code = "nothing-trains"
    task: str = ""

    @property
    def title(self) -> str:
        what = f"task '{self.task}'" if self.task else "the spec"
        return f"nothing would train: {what} applies no method and trains no parameter"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("for example: apply lora(r=8) to attn.q, attn.v",)


class FrozenInATask(Diagnostic):
    code = "frozen-in-a-task"
    task: str
    parameter: str
    trains: Span

    @property
    def title(self) -> str:
        return f"{self.parameter} learns for all tasks, and '{self.task}' would freeze it"

    @property
    def secondary(self) -> tuple[Label, ...]:
        return (Label(self.trains, "trains it for all"),)

    @property
    def notes(self) -> tuple[str, ...]:
        return ("let each task that it is to learn for train it",)


class NotByRow(Diagnostic):
    code = "not-by-row"
    what: str
    site: str
    reason: str

    @property
    def title(self) -> str:
        return f"{self.what} at {self.site} cannot be for some rows of a batch: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("run the tasks one after the other, each in use for a batch of its own",)


class CannotStore(Diagnostic):
    code = "cannot-store"
    storage: str
    site: str
    reason: str
    others: int

    @property
    def title(self) -> str:
        return f"{self.storage} cannot store {among(self.site, self.others)}: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("leave it out, for example: quantize linear except head with nf4",)


class StoredTwice(Diagnostic):
    code = "stored-twice"
    weight: str
    others: int
    first: Span

    @property
    def title(self) -> str:
        more = f" and {self.others} more have" if self.others else " has"
        return f"{self.weight}{more} two storages"

    @property
    def secondary(self) -> tuple[Label, ...]:
        return (Label(self.first, "first here"),)

    @property
    def notes(self) -> tuple[str, ...]:
        return ("a weight is stored as a whole, and once: take it out of one of them with 'except'",)


class StoredAndTrained(Diagnostic):
    code = "stored-and-trained"
    weight: str
    others: int
    first: Span

    @property
    def title(self) -> str:
        more = f" and {self.others} more are" if self.others else " is"
        return f"{self.weight}{more} to be stored frozen and to be trained"

    @property
    def secondary(self) -> tuple[Label, ...]:
        return (Label(self.first, "trains it"),)

    @property
    def notes(self) -> tuple[str, ...]:
        return ("packed numbers have no gradient: leave it out of one of them, or apply a method such as lora to it",)
