"""What can go wrong with a compiled model in its user's hands, after the compile."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic, PeftcError, choices, suggest


class FixedPrecision(Diagnostic):
    code = "fixed-precision"
    tensor: str
    captured: str
    asked: str

    @property
    def title(self) -> str:
        return f"{self.tensor} cannot become {self.asked}: the graph's casts were made for {self.captured}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            f"cast the base model and compile that, or compile a reference with dtype='{self.asked}'",
            "torch.autocast, and a Trainer's bf16=True, work on a compiled model as it is",
        )


class NoPickle(Diagnostic):
    code = "no-pickle"
    model: str

    @property
    def title(self) -> str:
        return f"a compiled {self.model} cannot be pickled: its code is made anew from the spec and the base model"

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            "model.save(folder) writes it and peftc.load(folder) reads it; torch.save(model.state_dict(), file) "
            "writes what learns",
            "a process that is to have it compiles or loads it itself",
        )


class NeverCalled(Diagnostic):
    code = "never-called"
    path: str
    blocks: str

    @property
    def title(self) -> str:
        return f"{self.path} only holds tensors: it is a part of the graph, and nothing calls it or its hooks"

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"the whole model and its blocks are called, such as {self.blocks}",) if self.blocks else ()


class OnTheBase(Diagnostic):
    code = "on-the-base"
    model: str
    name: str

    @property
    def title(self) -> str:
        return f"{self.model}.{self.name} acts on modules that a compiled model has as a graph"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("do it to the base model before the compile, or to what .merge() returns",)


class NoNoise(Diagnostic):
    """NEFTune's noise where positions are given, by which texts in a row are told apart: they are tried on tokens."""

    code = "no-noise"
    title = "no noise is added to the embeddings of texts whose positions are given"
    notes = ("leave neftune_noise_alpha out, or pad the texts and leave the positions to the model",)


class CannotRecompute(Diagnostic):
    code = "cannot-recompute"
    model: str
    reason: str

    @property
    def title(self) -> str:
        return f"a backward pass of {self.model} cannot compute its blocks again as asked: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("leave that out, or train with activation_checkpointing=False (TRL: gradient_checkpointing=False)",)


class OnlyOnTheBase(PeftcError, AttributeError):
    """As an AttributeError, so that `hasattr` says no."""


class CannotUnfreeze(Diagnostic):
    code = "cannot-unfreeze"
    weight: str

    @property
    def title(self) -> str:
        return f"{self.weight} cannot be unfrozen: a method on it writes it anew from the base model's"

    @property
    def notes(self) -> tuple[str, ...]:
        return (f'say train "{self.weight}" in the spec instead of that method',)


class NotInSpec(Diagnostic):
    code = "not-in-spec"
    weights: tuple[str, ...]

    @property
    def title(self) -> str:
        more = f" and {len(self.weights) - 3} more" if len(self.weights) > 3 else ""
        return f"the spec does not train {choices(self.weights[:3], 'and')}{more}, which differs from the base model's"

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            "an artifact is the spec and what it trains: compile with "
            f'train "{self.weights[0]}" in the spec, and give that model this one\'s state_dict()',
        )


class Transformed(Diagnostic):
    code = "transformed"

    @property
    def title(self) -> str:
        return "a fused model cannot be transformed by torch.func or differentiated in forward mode"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("loss.backward() and torch.autograd.grad work; for others: peftc.compile(..., fuse=False)",)


class TakenName(Diagnostic):
    code = "taken-name"
    model: str
    name: str

    @property
    def title(self) -> str:
        return f"{self.model} has a part called '{self.name}', by which name a compiled model has something of its own"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("give it another name, or compile a module that holds the model as a part of any other name",)


class NotWhenTraced(Diagnostic):
    code = "other-sizes"

    @property
    def title(self) -> str:
        return "torch.compile traces a call with sizes that the graph was not captured for"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("compile it with an example= of these sizes; a call without torch.compile says what the model asks",)


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
        return f"{self.model} does not continue text"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("a model that does has a language modeling head, such as AutoModelForCausalLM gives it",)


class OtherCache(Diagnostic):
    code = "other-cache"
    model: str
    kind: str

    @property
    def title(self) -> str:
        return f"a compiled {self.model} cannot go on from a cache of the kind {self.kind}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("it keeps every token, as transformers.DynamicCache() does: pass such a one, or none",)


class OtherMask(Diagnostic):
    code = "other-sizes"
    model: str
    name: str
    given: tuple[int, ...]
    wanted: tuple[int, ...]

    @property
    def title(self) -> str:
        return f"{self.model} is called with {self.name} {list(self.given)} where it is to be {list(self.wanted)}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("the mask has an entry for each token that was read before, and for each that is new",)


class NoPadding(Diagnostic):
    code = "no-padding"
    model: str

    @property
    def title(self) -> str:
        return f"{self.model} was captured without a mask, and is called with padding"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("generate each text by itself, or texts of one length",)


class NotCaptured(Diagnostic):
    code = "not-captured"
    model: str
    name: str

    @property
    def title(self) -> str:
        return f"a compiled {self.model} has no {self.name.removeprefix('output_').replace('_', ' ')} to return"

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"leave {self.name} out, or ask what .merge() returns for them",)


class WithoutHead(Diagnostic):
    code = "without-head"
    model: str

    @property
    def title(self) -> str:
        return f"a compiled {self.model} has no hidden states that its head alone makes logits of"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("take the methods at the head out of the spec, or compute the loss from the logits",)


class OwnLoss(Diagnostic):
    code = "own-loss"
    model: str
    method: str

    @property
    def title(self) -> str:
        return f"{self.method} adds to the loss that {self.model} itself returns, and this loss is computed elsewhere"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("train it with transformers' Trainer, or add model.penalty() to a loss of your own",)


class BadSchedule(Diagnostic):
    code = "bad-schedule"
    method: str
    reason: str

    @property
    def title(self) -> str:
        return f"the schedule of {self.method} does not fit the training: {self.reason}"


class UnknownTask(Diagnostic):
    code = "unknown-task"
    name: str
    known: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"there is no task '{self.name}'"

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.known:
            return ("the spec has none: task NAME { apply … } makes one",)
        return (suggest(self.name, self.known) or f"there are {', '.join(self.known)}",)


class TextsMix(Diagnostic):
    code = "texts-mix"
    model: str
    reason: str

    @property
    def title(self) -> str:
        return f"of several texts in a row this {self.model} does not make what it makes of each alone: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            "give it a row for each text, padded, with an attention_mask",
            "with an attention_mask, position_ids are positions alone and tell no texts apart",
        )


class OtherProcess(Diagnostic):
    """The one process that writes for all of them could not."""

    code = "other-process"
    title = "another process, which writes for this one, could not: it says why"


class InParts(Diagnostic):
    """What is not done with a model of which each process has a part."""

    code = "in-parts"
    what: str

    @property
    def title(self) -> str:
        return f"{self.what} needs the whole model, and each process has a part of this one"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("model.save(folder), on all processes, writes it whole; peftc.load(folder) reads it on one",)
