"""What cannot be shown."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic, suggest


class UnknownBlock(Diagnostic):
    code = "unknown-block"
    name: str
    model: str
    near: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.model} has no block '{self.name}'"

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"nearest: {', '.join(self.near)}",) if self.near else ("peftc sites lists the blocks of a model",)


class UnknownPass(Diagnostic):
    code = "unknown-pass"
    name: str
    known: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"there is no pass '{self.name}'"

    @property
    def notes(self) -> tuple[str, ...]:
        near = suggest(self.name, self.known)
        return (*((near,) if near else ()), f"the passes are: {', '.join(self.known)}")


class NotAnImage(Diagnostic):
    code = "not-an-image"
    path: str

    @property
    def title(self) -> str:
        return f"'{self.path}' is no name of an image that can be written"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("an image is an .svg file; rsvg-convert, Inkscape and every browser make others of it",)
