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


class NoDevice(Diagnostic):
    code = "no-device"
    name: str
    reason: str

    @property
    def title(self) -> str:
        return f"there is no device '{self.name}': {self.reason}"
