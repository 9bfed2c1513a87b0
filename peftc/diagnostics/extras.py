"""Libraries that peftc does without, but for some of what it does."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic


class NeedsExtra(Diagnostic):
    code = "not-installed"
    command: str  # or what else is wanted
    package: str
    extra: str

    @property
    def title(self) -> str:
        return f"{self.command} needs {self.package}, which is not installed"

    @property
    def notes(self) -> tuple[str, ...]:
        return (f'pip install "peftc[{self.extra}]"',)
