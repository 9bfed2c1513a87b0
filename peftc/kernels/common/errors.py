"""What an operation cannot do."""

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


class OtherOutput(Diagnostic):
    code = "other-output"
    module: str
    found: str
    wanted: str

    @property
    def title(self) -> str:
        return f"{self.module} made a tensor of sizes {self.found}, where its graph goes on with {self.wanted}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            "it runs its own code, as it could not be traced, and how its sizes follow from its input's was found out "
            "by running it with some",
            "compile the model with an example= of these sizes",
        )
