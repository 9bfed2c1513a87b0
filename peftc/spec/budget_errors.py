"""The mistakes of `require` and `fit`, and of the ranks that are left to `fit`."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic, suggest
from peftc.diagnostics.source import Label, Span

# What other tools offer to use, and why it is not here.
ABSENT = {
    "offload": "frozen weights lie where the model computes: nothing here moves them to the host and back",
}


class UnknownQuantity(Diagnostic):
    code = "unknown-quantity"
    name: str
    known: tuple[str, ...]
    fitted: bool = False

    @property
    def title(self) -> str:
        return f"'{self.name}' is nothing that can be {'fitted' if self.fitted else 'required'}"

    @property
    def label(self) -> str:
        return suggest(self.name, self.known) or f"one of {', '.join(self.known)}"


class WrongUnit(Diagnostic):
    code = "wrong-unit"
    quantity: str
    expects: str

    @property
    def title(self) -> str:
        return f"{self.quantity} is compared with {self.expects}"


class EmptyBudget(Diagnostic):
    code = "empty-budget"
    quantity: str
    bound: str

    @property
    def title(self) -> str:
        return f"whatever the model, this says the same of {self.quantity}: {self.bound}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("give a limit that one model keeps and another does not, or leave the line out",)


class UnknownTool(Diagnostic):
    """Something by which a `fit` cannot save memory."""

    code = "unknown-tool"
    name: str
    known: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"memory is not fitted by '{self.name}'"

    @property
    def label(self) -> str:
        return suggest(self.name, self.known) or ""

    @property
    def notes(self) -> tuple[str, ...]:
        absent = ABSENT.get(self.name)
        return (*([absent] if absent else []), f"what there is to use: {', '.join(self.known)}")


class UsesTwice(Diagnostic):
    code = "uses-twice"
    name: str
    first: Span

    @property
    def title(self) -> str:
        return f"'{self.name}' is to be used twice"

    @property
    def secondary(self) -> tuple[Label, ...]:
        return (Label(self.first, "first here"),)


class UsesForRanks(Diagnostic):
    code = "uses-for-ranks"
    quantity: str
    label = "leave 'using' out"

    @property
    def title(self) -> str:
        return f"{self.quantity} is fitted by the ranks that are auto, and by nothing else"


class FitsTwice(Diagnostic):
    code = "fits-twice"
    quantity: str
    first: Span

    @property
    def title(self) -> str:
        return f"{self.quantity} is fitted twice"

    @property
    def secondary(self) -> tuple[Label, ...]:
        return (Label(self.first, "first here"),)

    @property
    def notes(self) -> tuple[str, ...]:
        return ("fit the tighter of the two, and 'require' the other",)


class FitsNothing(Diagnostic):
    """A share of what learns, and no rank to be found for it."""

    code = "fits-nothing"
    title = "there is nothing to choose: no rank is auto"
    notes = ("for example: apply lora(r=auto) to attn.*",)


class AutoWithoutFit(Diagnostic):
    code = "auto-without-fit"
    title = "nothing says how large this rank may become"
    label = "give a number, or a limit"
    notes = ("for example: fit trainable <= 0.5%",)


class FitsTasks(Diagnostic):
    """A `fit` in a spec whose tasks are different sets of statements."""

    code = "fits-tasks"
    title = "a spec with tasks is not fitted: what one of them needs is not what another needs"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("fit a spec of one task alone, and write what it chose into this one; 'require' holds for all tasks",)
