"""What training can be given wrong."""

from __future__ import annotations

import shlex

from peftc.diagnostics.diagnostic import Diagnostic


class BadData(Diagnostic):
    """One record that is not what its file's first record promised."""

    code = "bad-data"
    where: str  # such as data.jsonl:17, where the place has no text to show
    reason: str
    hint: str = ""

    @property
    def title(self) -> str:
        return self.reason if self.span else f"{self.where}: {self.reason}"

    @property
    def label(self) -> str:
        return self.hint

    @property
    def notes(self) -> tuple[str, ...]:
        return () if self.span or not self.hint else (self.hint,)


class UnknownColumns(Diagnostic):
    code = "unknown-columns"
    where: str
    columns: tuple[str, ...]
    known: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.where} has the columns {', '.join(self.columns) or 'none'}, which say nothing of what to learn"

    @property
    def notes(self) -> tuple[str, ...]:
        first, second = self.columns[:2] if len(self.columns) > 1 else ("question", "reply")
        answers, classes = (
            " ".join(shlex.quote(f"{ours}={theirs}") for ours, theirs in zip(names, (first, second), strict=True))
            for names in (("prompt", "completion"), ("text", "label"))
        )
        such = f"say which is which: --columns {answers}, or of classes: --columns {classes}"
        return (f"known are: {'; '.join(self.known)}", such)


class NoData(Diagnostic):
    code = "no-data"
    source: str
    reason: str

    @property
    def title(self) -> str:
        return f"no data is to be had from {self.source}: {self.reason}"


class NoTemplate(Diagnostic):
    code = "no-chat-template"
    source: str

    @property
    def title(self) -> str:
        return f"the data has messages, and the tokenizer of {self.source} has no chat template for them"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("give one by --chat-template FILE, or data with the columns prompt and completion",)


class BadTemplate(Diagnostic):
    code = "bad-chat-template"
    where: str
    reason: str

    @property
    def title(self) -> str:
        return f"the chat template does not write {self.where} so that an answer can be told: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("give another one by --chat-template FILE",)


class BadSettings(Diagnostic):
    code = "bad-settings"
    where: str
    reason: str
    hint: str = ""

    @property
    def title(self) -> str:
        return f"{self.where}: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (self.hint,) if self.hint else ()


class OtherRun(Diagnostic):
    code = "other-run"
    folder: str
    differences: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.folder} holds another run"

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.differences, "choose another folder, or begin anew there with --fresh")


class WrongModel(Diagnostic):
    code = "wrong-model"
    model: str
    data: str
    reason: str

    @property
    def title(self) -> str:
        return f"{self.model} does not learn from {self.data}: {self.reason}"


class NothingToLearn(Diagnostic):
    code = "nothing-to-learn"
    reason: str

    @property
    def title(self) -> str:
        return f"there is nothing to learn from: {self.reason}"


class SeveralTasks(Diagnostic):
    code = "several-tasks"
    spec: str
    tasks: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.spec} has the tasks {', '.join(self.tasks)}, and a run is of one"

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            "train each by a spec with its statements alone, and join what they wrote: compiled.add_task(NAME, DIR)",
        )
