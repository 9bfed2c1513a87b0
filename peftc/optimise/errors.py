"""What keeps a block from being run as a statement says."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic


class CannotCheckpoint(Diagnostic):
    code = "cannot-checkpoint"
    block: str

    @property
    def title(self) -> str:
        return f"{self.block} cannot be computed again by itself: another part of the model runs between its operations"
