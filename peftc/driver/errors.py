"""What goes wrong between the stages: bugs of a pass, plans used twice, batches that methods cannot start from."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic


class VerifierFailed(Diagnostic):
    code = "verifier-failed"
    pass_name: str
    reason: str

    @property
    def title(self) -> str:
        return f"peftc broke the graph in pass '{self.pass_name}': {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("this is a bug in peftc, not in the spec: please report it with the spec and the model's config",)


class NeedsCalibration(Diagnostic):
    """A method that starts from data, compiled without any."""

    code = "needs-calibration"
    method: str

    @property
    def title(self) -> str:
        return f"{self.method} starts from data, and there is none"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("pass calibration=, some batches as the model is called; on the command line, --calibration FILE",)


class BadCalibration(Diagnostic):
    code = "bad-calibration"
    reason: str

    @property
    def title(self) -> str:
        return f"the calibration batches cannot be used: {self.reason}"


class UsedPlan(Diagnostic):
    """A plan whose graph passes have rewritten already."""

    code = "used-plan"
    model: str

    @property
    def title(self) -> str:
        return f"this plan of {self.model} was built already, and its graph is another one since"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("plan once more for another module: a plan is cheap beside what it plans",)


class BadTask(Diagnostic):
    code = "bad-task"
    task: str
    reason: str

    @property
    def title(self) -> str:
        return f"{self.task} cannot be a task of this model: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("save it from a model with the same statements outside its tasks, as they are trained here",)


class CannotCalibrate(Diagnostic):
    """A method that starts from data, in a task that comes to a model that is there."""

    code = "cannot-calibrate"
    method: str

    @property
    def title(self) -> str:
        return f"{self.method} starts from data, which a task that is added later has none of"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("compile it with calibration=, save it, and add the folder",)


class NothingToExplain(Diagnostic):
    code = "nothing-to-explain"
    asked: str
    has: str
    place: str | None = None  # that is called as the line that was asked for
    near: str | None = None

    @property
    def title(self) -> str:
        return f"there is nothing at {self.asked}: {self.has}"

    @property
    def notes(self) -> tuple[str, ...]:
        named = f"there is a place called {self.place}: ask for it with --place" if self.place else None
        return (*filter(None, (named, self.near)), "`peftc sites MODEL --all` lists the places of a model by name")
