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


class OtherRows(Diagnostic):
    code = "other-rows"
    tasks: int
    batch: int

    @property
    def title(self) -> str:
        return f"there are {self.tasks} tasks for a batch of {self.batch}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("give one task, or None, for each row",)
