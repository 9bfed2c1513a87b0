"""What a fused operation cannot do."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic


class SecondDerivative(Diagnostic):
    code = "second-derivative"

    @property
    def title(self) -> str:
        return "a fused model has first derivatives only: create_graph=True asks for more"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("peftc.compile(..., fuse=False) has the others",)
