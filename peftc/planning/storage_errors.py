"""What cannot be stored as a statement says."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic, among
from peftc.diagnostics.source import Label, Span


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
