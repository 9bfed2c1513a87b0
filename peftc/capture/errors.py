"""What keeps a model from becoming a graph, and a graph from being called."""

from __future__ import annotations

from peftc.diagnostics.diagnostic import Diagnostic, among

WHENEVER_IT_RUNS = "whenever it runs"


class NeedsExample(Diagnostic):
    code = "needs-example"
    model: str
    tried: str = ""

    @property
    def title(self) -> str:
        return f"{self.model} does not say what its inputs look like"

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            *((f"tried with some that others take: {self.tried}",) if self.tried else ()),
            "pass example=<a tensor, a tuple, or a dict of keyword arguments>, with a batch of two or more; on the "
            "command line, the function of path/to/file.py:function returns both, (model, example)",
        )


class CannotCapture(Diagnostic):
    code = "cannot-capture"
    model: str
    reason: str
    file: str | None
    line: int | None
    source: str | None
    modules: tuple[str, ...] = ()  # that it is in, where the graph says it, the innermost first

    @property
    def title(self) -> str:
        return f"{self.model} cannot be captured as a graph: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        where = (f"at {self.file}:{self.line}: {self.source}",) if self.file else ()
        return (*where, self.remedy)

    @property
    def remedy(self) -> str:
        """A branch on a value needs another remedy than a forward that fails by itself."""
        if "data-dependent" in self.reason:
            return (
                "torch.export needs a forward without branches on tensor values; replace the branch by torch.where "
                "or torch.cond, or pass an example= that avoids it"
            )
        if self.reason.endswith(WHENEVER_IT_RUNS):
            return "a weight that a forward changes is not frozen: turn that off in the config, or in the code"
        return "its forward must run on the example inputs first: check the config, or pass other inputs as example="


class PackedLayers(Diagnostic):
    code = "packed-layers"
    model: str
    layer: str
    kind: str
    others: int

    @property
    def title(self) -> str:
        layers = among(self.layer, self.others)
        return f"{self.model} cannot be captured as a graph: {layers} are bitsandbytes' {self.kind}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            "give the folder or id of the checkpoint instead: what bitsandbytes packed is read from there",
            "or load the model without quantization_config, and let the spec say: quantize linear except head with nf4",
        )


class MadeForInference(Diagnostic):
    code = "made-for-inference"
    model: str
    parameter: str

    @property
    def title(self) -> str:
        return f"{self.model} cannot be trained: its {self.parameter} was made in torch.inference_mode()"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("make or load the model outside of it",)


class StaysRandom(Diagnostic):
    """A forward that branches on `training` in Python and draws random numbers there."""

    code = "stays-random"
    model: str
    op: str
    where: tuple[str, ...]
    modules: tuple[str, ...] = ()  # that it is in, the innermost first

    @property
    def line(self) -> str:
        """Of the code that draws them."""
        return " ".join(line.strip() for line in self.where)

    @property
    def title(self) -> str:
        return f"{self.model} draws random numbers ({self.op}) that its graph could not stop drawing in eval()"

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            *self.where,
            "set its probability (drop path, layer drop) to 0, or use torch.nn.functional.dropout there",
        )


class OtherSizes(Diagnostic):
    code = "other-sizes"
    model: str
    given: str
    captured: str
    where: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.model} was captured for {self.captured}, and is called with {self.given}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            *(f"at {line}" for line in self.where),
            "compile it with an example= of these sizes, or cut or pad the input to sizes for which that holds",
        )


class NoRoom(Diagnostic):
    code = "no-room"
    given: int
    room: int

    @property
    def title(self) -> str:
        return f"the input has {self.given} tokens, and what stands in front of it leaves positions for {self.room}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("cut the input, or compile a shorter prompt or prefix",)


class TextsDisagree(Diagnostic):
    code = "texts-disagree"
    one: str
    other: str
    reason: str

    @property
    def title(self) -> str:
        return f"{self.one} and {self.other} do not say the same of the texts in a row: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        return ("position_ids that begin again at each text, with no attention_mask, say it all",)
