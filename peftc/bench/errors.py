"""What cannot be measured."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic


class CannotMeasure(Diagnostic):
    code = "cannot-measure"
    model: str
    reason: str

    @property
    def title(self) -> str:
        return f"no step of {self.model} can be measured: {self.reason}"


class NeedsValues(Diagnostic):
    code = "needs-values"
    operation: str

    @property
    def title(self) -> str:
        return f"no step can be counted that decides by the numbers in a tensor: {self.operation} asks for them"


class UnknownCard(Diagnostic):
    code = "unknown-card"
    name: str
    known: tuple[str, ...]

    @property
    def title(self) -> str:
        if not self.name:
            return "an estimate needs a card, or both a bandwidth and a rate of products"
        return f"no card is known as '{self.name}'"

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"known are {', '.join(self.known)}; a bandwidth and a rate together say what another one does",)


class NoDevice(Diagnostic):
    code = "no-device"
    name: str
    reason: str

    @property
    def title(self) -> str:
        return f"there is no device '{self.name}': {self.reason}"
