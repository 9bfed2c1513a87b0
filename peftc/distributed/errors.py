"""What cannot run on several processes, or go on from a folder."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic


class NotOnParts(Diagnostic):
    """A method, a storage or a model that several processes cannot have parts of."""

    code = "not-on-parts"
    what: str
    reason: str
    hint: str = ""

    @property
    def title(self) -> str:
        return f"{self.what} cannot be on several processes in parts: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (self.hint,) if self.hint else ()


class BadProgress(Diagnostic):
    """A folder that no training goes on from."""

    code = "bad-progress"
    folder: str
    reason: str

    @property
    def title(self) -> str:
        return f"no training goes on from '{self.folder}': {self.reason}"
