"""What can be wrong with a folder that was saved or is to be, and what cannot be written."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic


class BadArtifact(Diagnostic):
    code = "bad-artifact"
    folder: str
    reason: str
    hint: str = ""

    @property
    def title(self) -> str:
        return f"'{self.folder}' is not an artifact that can be used: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (self.hint,) if self.hint else ()


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
        return f"'{self.folder}' is no empty folder, and is left alone: name another one"


class CannotWrite(Diagnostic):
    code = "cannot-write"
    folder: str
    reason: str

    @property
    def title(self) -> str:
        return f"'{self.folder}' cannot be written: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("the folder holds what was there before or all that is new, nothing between",)


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


class NotFinite(Diagnostic):
    """A merged weight with numbers that are none, where the base model has numbers."""

    code = "not-finite"
    weight: str
    count: int
    dtype: str
    learned: bool

    @property
    def title(self) -> str:
        numbers = "a number" if self.count == 1 else f"{self.count:,} numbers"
        return f"{self.weight} cannot be merged: {numbers} of it would be infinite or no number, and the base's are not"

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.learned:
            return ("what was learned for it is not finite itself: the training has diverged",)
        return (
            f"what was learned is, but the sum is too large for {self.dtype}: save() keeps it beside the base model",
        )


class CannotCombine(Diagnostic):
    code = "cannot-combine"
    folder: str
    reason: str
    hint: str = ""

    @property
    def title(self) -> str:
        place = f"'{self.folder}' cannot be combined: " if self.folder else "these cannot be combined: "
        return place + self.reason

    @property
    def notes(self) -> tuple[str, ...]:
        return (self.hint,) if self.hint else ()
