"""What only a command line can be given wrong."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic


class NoChatTemplate(Diagnostic):
    code = "no-chat-template"
    source: str

    @property
    def title(self) -> str:
        return f"the tokenizer of {self.source} has no chat template"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("leave --chat out, and write the prompt as the model was trained on it",)


class WhichTask(Diagnostic):
    code = "which-task"
    tasks: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"the artifact has {len(self.tasks)} tasks, and one is folded in: {', '.join(self.tasks)}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"for example: --task {self.tasks[0]}",)
