"""What a runtime's format cannot hold, and what to do instead."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic

AS_MERGED = "export it merged: merged=True, on the command line --merged"


class NotInGguf(Diagnostic):
    code = "not-in-gguf"
    reason: str
    instead: str

    @property
    def title(self) -> str:
        return f"a GGUF file cannot hold this: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (self.instead,)


class NotInVllm(Diagnostic):
    code = "not-in-vllm"
    reason: str
    instead: str

    @property
    def title(self) -> str:
        return f"vLLM does not take this: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (self.instead,)


class UnknownExport(Diagnostic):
    code = "unknown-export"
    what: str
    given: str
    known: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"there is no {self.what} '{self.given}' to export to: {', '.join(self.known)}"


class NoTokenizerToExport(Diagnostic):
    code = "no-tokenizer"
    reason: str

    @property
    def title(self) -> str:
        return f"a merged export comes with a tokenizer, and there is none: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("pass tokenizer=, on the command line --tokenizer: a folder or hub id that has one",)


class FileThere(Diagnostic):
    code = "bad-output"
    file: str

    @property
    def title(self) -> str:
        return f"'{self.file}' is there already, and is left alone: name another file"
