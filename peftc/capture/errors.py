"""What keeps a model from being read or from becoming a graph, and a graph from being called."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic, among, listed


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
        layers = among(self.layer, self.others)
        return f"{self.model} cannot be captured as a graph: {layers} are bitsandbytes' {self.kind}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            "give the folder or id of the checkpoint instead: what bitsandbytes packed is read from there",
            "or load the model without quantization_config, and let the spec say: quantize linear except head with nf4",
        )


class MadeForInference(Diagnostic):
    code = "made-for-inference"
    model: str
    parameter: str

    @property
    def title(self) -> str:
        return f"{self.model} cannot be trained: its {self.parameter} was made in torch.inference_mode()"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("make or load the model outside of it",)


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


class OtherSizes(Diagnostic):
    code = "other-sizes"
    model: str
    given: str
    captured: str
    where: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.model} was captured for {self.captured}, and is called with {self.given}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            *(f"at {line}" for line in self.where),
            "compile it with an example= of these sizes, or cut or pad the input to sizes for which that holds",
        )


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


class MissingWeights(Diagnostic):
    """Weights that the checkpoint does not have: left random, they would make another model."""

    code = "missing-weights"
    reference: str
    model: str
    weights: tuple[str, ...]
    unread: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        weights = among(self.weights[0], len(self.weights) - 1)
        return f"'{self.reference}' has no {weights}, which {self.model} computes with"

    @property
    def notes(self) -> tuple[str, ...]:
        missing = (f"missing: {listed(self.weights)}",) if len(self.weights) > 1 else ()
        unread = (f"there, and of no use to it: {listed(self.unread)}",) if self.unread else ()
        return (*missing, *unread, "get the checkpoint again; or make the model in Python, and pass that")


class UntrainedHead(Diagnostic):
    """A head that the checkpoint does not have, and that nothing trains."""

    code = "untrained-head"
    reference: str
    model: str
    weights: tuple[str, ...]

    @property
    def title(self) -> str:
        weights = among(self.weights[0], len(self.weights) - 1)
        return f"'{self.reference}' has no {weights}, and the spec leaves {self.model} with random numbers there"

    @property
    def notes(self) -> tuple[str, ...]:
        missing = (f"untrained: {listed(self.weights)}",) if len(self.weights) > 1 else ()
        layers = dict.fromkeys(f'"{name.rpartition(".")[0]}"' for name in self.weights)
        return (*missing, f"let it learn: train {listed(tuple(layers))}")


class OtherShape(Diagnostic):
    code = "other-shape"
    reference: str
    weight: str
    found: list[int]
    expected: list[int]

    @property
    def title(self) -> str:
        return f"{self.weight} is {self.found} in '{self.reference}', where the model has {self.expected}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("config.json is of another model than the weights: get the checkpoint again, or mend it",)


class NoWeights(Diagnostic):
    code = "no-weights"
    reference: str

    @property
    def title(self) -> str:
        return f"'{self.reference}' is a bare config, which has no weights"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("peftc plan needs none; to compile, name the folder with the weights, or add --random-weights",)


class ChangedCheckpoint(Diagnostic):
    code = "changed-checkpoint"
    weight: str
    reason: str

    @property
    def title(self) -> str:
        return f"cannot read {self.weight} from the checkpoint: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            "the weights that a spec quantises are read one by one, some of them again when a method asks: leave the "
            "checkpoint's files alone meanwhile, or pass a model that is in memory",
        )
