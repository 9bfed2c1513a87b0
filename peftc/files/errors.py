"""What can be wrong with a model reference or a folder that was saved."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic

# --- references and artifacts -----------------------------------------------------------------------------------------


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


class BadArtifact(Diagnostic):
    code = "bad-artifact"
    folder: str
    reason: str

    @property
    def title(self) -> str:
        return f"'{self.folder}' is not an artifact that can be used: {self.reason}"


class CannotExport(Diagnostic):
    code = "cannot-export"
    reason: str

    @property
    def title(self) -> str:
        return f"HF PEFT's folder cannot hold this: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("save() keeps everything, for peftc.load",)


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


class BadStateFile(Diagnostic):
    """A file of tensors that a spec names."""

    code = "bad-state-file"
    path: str
    reason: str

    @property
    def title(self) -> str:
        return f"'{self.path}' cannot be started from: {self.reason}"
