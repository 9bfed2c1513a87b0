"""The mistakes that only show with a model at hand: capture, matching, attaching, budgets, using."""

from __future__ import annotations

from peftc.errors import Diagnostic, choices, suggest
from peftc.text import Label, Span

# --- capture ----------------------------------------------------------------------------------------------------------


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


class PackedLayers(Diagnostic):
    code = "packed-layers"
    model: str
    layer: str
    kind: str
    others: int

    @property
    def title(self) -> str:
        more = f" and {self.others} more" if self.others else ""
        return f"{self.model} cannot be captured as a graph: {self.layer}{more} are bitsandbytes' {self.kind}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            "give the folder or id of the checkpoint instead: what bitsandbytes packed is read from there",
            "or load the model without quantization_config, and let the spec say: quantize linear except head with nf4",
        )


class StaysRandom(Diagnostic):
    """A forward that branches on `training` in Python and draws random numbers there."""

    code = "stays-random"
    model: str
    op: str
    where: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.model} draws random numbers ({self.op}) that its graph could not stop drawing in eval()"

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            *self.where,
            "set its probability (drop path, layer drop) to 0, or use torch.nn.functional.dropout there",
        )


# --- matching ---------------------------------------------------------------------------------------------------------


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
        more = f" and {self.others} more" if self.others else ""
        return f"{self.method} cannot attach to {self.site}{more}: {self.reason}"


class CannotCheckpoint(Diagnostic):
    code = "cannot-checkpoint"
    block: str

    @property
    def title(self) -> str:
        return f"{self.block} cannot be computed again by itself: another part of the model runs between its operations"


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


class CannotStart(Diagnostic):
    """A method whose start is made of something that is not there; a saved one needs no start."""

    code = "cannot-start"
    method: str
    reason: str

    @property
    def title(self) -> str:
        return f"{self.method} has nothing to start from: {self.reason}"


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


# --- storage ----------------------------------------------------------------------------------------------------------


class CannotStore(Diagnostic):
    code = "cannot-store"
    storage: str
    site: str
    reason: str
    others: int

    @property
    def title(self) -> str:
        more = f" and {self.others} more" if self.others else ""
        return f"{self.storage} cannot store {self.site}{more}: {self.reason}"

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


# --- budgets ----------------------------------------------------------------------------------------------------------


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


# --- inside the compiler ----------------------------------------------------------------------------------------------


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


# --- using a compiled model -------------------------------------------------------------------------------------------


class NeedsLabels(Diagnostic):
    code = "needs-labels"
    model: str

    @property
    def title(self) -> str:
        return f"{self.model} was compiled with labels, and makes its decoder's inputs from them"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("pass labels=, or compile with example={'input_ids': …, 'decoder_input_ids': …}",)


class NoRoom(Diagnostic):
    code = "no-room"
    given: int
    room: int

    @property
    def title(self) -> str:
        return f"the input has {self.given} tokens, and what stands in front of it leaves positions for {self.room}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("cut the input, or compile a shorter prompt or prefix",)


class CannotGenerate(Diagnostic):
    code = "cannot-generate"
    model: str

    @property
    def title(self) -> str:
        return f"{self.model} does not continue text, or was captured without an attention mask"


class NeedsCalibration(Diagnostic):
    """A method that starts from data, compiled without any."""

    code = "needs-calibration"
    method: str

    @property
    def title(self) -> str:
        return f"{self.method} starts from data, and there is none"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("pass calibration=, some batches as the model is called; on the command line, --calibration FILE",)


class BadSchedule(Diagnostic):
    code = "bad-schedule"
    method: str
    reason: str

    @property
    def title(self) -> str:
        return f"the schedule of {self.method} does not fit the training: {self.reason}"


class BadCalibration(Diagnostic):
    code = "bad-calibration"
    reason: str

    @property
    def title(self) -> str:
        return f"the calibration batches cannot be used: {self.reason}"


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


# --- show -------------------------------------------------------------------------------------------------------------


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


# --- bench ------------------------------------------------------------------------------------------------------------


class CannotMeasure(Diagnostic):
    code = "cannot-measure"
    model: str
    reason: str

    @property
    def title(self) -> str:
        return f"no step of {self.model} can be measured: {self.reason}"


class NoDevice(Diagnostic):
    code = "no-device"
    name: str
    reason: str

    @property
    def title(self) -> str:
        return f"there is no device '{self.name}': {self.reason}"
