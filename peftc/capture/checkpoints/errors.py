"""What keeps a model and its weights from being read."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic, among, listed

PRECISIONS = ("float32", "float16", "bfloat16", "float64")  # that a model can be asked for in, as torch calls them


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


class UnknownPrecision(Diagnostic):
    code = "unknown-precision"
    dtype: str

    @property
    def title(self) -> str:
        return f"a model cannot be read as {self.dtype}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"dtype is one of {', '.join(PRECISIONS)}; without it, the checkpoint's own",)


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


class NoTokenizer(Diagnostic):
    code = "no-tokenizer"
    what: str
    source: str
    reason: str

    @property
    def title(self) -> str:
        return f"no {self.what} is to be had from {self.source}: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("name a folder or hub id that has one by --tokenizer",)
