"""What keeps a method's tensors from being made."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic


class BadStateFile(Diagnostic):
    """A file of tensors that a spec names."""

    code = "bad-state-file"
    path: str
    reason: str

    @property
    def title(self) -> str:
        return f"'{self.path}' cannot be started from: {self.reason}"


class NoMemory(Diagnostic):
    code = "no-memory"
    wanted: int
    there: int

    @property
    def title(self) -> str:
        return f"what the spec adds takes {self.wanted:,} bytes, and the machine has {self.there:,}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("peftc plan says what each statement takes, without taking it",)


class CannotStart(Diagnostic):
    """A method whose start is made of something that is not there; a saved one needs no start."""

    code = "cannot-start"
    method: str
    reason: str

    @property
    def title(self) -> str:
        return f"{self.method} has nothing to start from: {self.reason}"


class LeavesNoNumbers(Diagnostic):
    """A weight that would not be finite any more, less what a method takes out of it or with what it adds."""

    code = "leaves-no-numbers"
    method: str
    weight: str
    dtype: str

    @property
    def title(self) -> str:
        return f"what {self.method} leaves of {self.weight} has numbers that {self.dtype} has not"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("compile on the base in a wider precision, or with a smaller alpha",)
