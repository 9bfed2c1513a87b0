"""`peftc bench --generate`: tokens a second of text that a model continues, against the base model and HF PEFT."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftc.api import compile
from peftc.bench.allocations import peak_bytes
from peftc.bench.bench import NOISE, SEED, device_name, versions
from peftc.bench.stopwatch import fastest, threads
from peftc.bench.variants import FUSED, HF_PEFT, headline, hf_peft, shared_copy
from peftc.diagnostics.timings import Timings
from peftc.planning.memory import formatted_bytes
from peftc.spec.check import SpecLike

BASE, ONE_TASK = "base", "peftc, one task"
FOOTNOTE = (
    "Greedy, with a cache; × is of the base model without an adapter. Peak: the most that is allocated above the\n"
    "parameters while one text is written, its cache among it."
)


@dataclass(frozen=True)
class Written:
    """What was measured of one variant; None where there is no such variant."""

    name: str
    seconds: float | None = None
    tokens: float | None = None  # a second, of all rows
    peak: int | None = None  # bytes
    note: str = ""
    agrees: bool = True


@dataclass(frozen=True)
class GenerationBench:
    """One run; the first row is the base model."""

    model: str
    spec: str
    batch: int
    prompt: int
    new: int
    dtype: str
    device: str
    threads: int
    repeats: int
    rows: tuple[Written, ...]
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether HF PEFT writes the same text."""
        return all(row.agrees for row in self.rows)

    def ratio(self, row: Written) -> float | None:
        """A row's tokens a second in units of the base's."""
        base = self.rows[0].tokens
        return row.tokens / base if row.tokens and base else None

    def to_json(self) -> dict[str, Any]:
        """All figures, with their ratios to the base."""
        rows = [asdict(row) | {"ratio": self.ratio(row)} for row in self.rows]
        return asdict(self) | {"rows": rows, "agrees": self.agrees}


def bench_generation(
    model: nn.Module, spec: SpecLike, *, example: Any = None, calibration: Iterable[Any] | None = None,
    batch: int | None = None, prompt: int = 16, new: int = 64, repeats: int = 5,
    thread_count: int = 1, timings: Timings | None = None,
) -> GenerationBench:  # fmt: skip
    """Measures how fast `model` writes with `spec`; the model is not changed.

    Where the spec has tasks each text is of another, in turn; beside it, all are of the first.

    Args:
        model: on the device to measure on, in the precision to measure in.
        spec: as for `peftc.compile`.
        example: as for `peftc.compile`.
        calibration: as for `peftc.compile`.
        batch: texts at once; one by default, two for each task.
        prompt: tokens that each begins with.
        new: tokens to write.
        repeats: rounds, of which the fastest counts.
        thread_count: threads that torch computes with on the CPU.
        timings: collects seconds by stage.

    Raises:
        PeftcError: with every mistake in the spec; `cannot-generate` for a model that continues no text.
    """
    timings = timings or Timings()
    with threads(thread_count):
        compiled = compile(model, spec, example=example, calibration=calibration, timings=timings).eval()
        random = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for parameter in compiled.trainable_parameters().values():
                parameter.add_((NOISE * torch.randn(parameter.shape, generator=random)).to(parameter))
        tasks = compiled.tasks
        batch = batch or max(1, 2 * len(tasks))
        in_turn = [tasks[row % len(tasks)] for row in range(batch)] if tasks else None
        with timings.stage("continuation"):
            for face in {compiled.face(in_turn), compiled.face()}:
                face.continuation()
        with timings.stage("HF PEFT"):
            theirs = hf_peft(model, compiled)
        base = shared_copy(model).eval()
        modules = {BASE: base, FUSED: compiled, HF_PEFT: theirs.module and theirs.module.eval()}
        options: dict[str, dict[str, Any]] = {}
        if tasks:
            modules = {BASE: base, ONE_TASK: compiled, FUSED: compiled, HF_PEFT: modules[HF_PEFT]}
            options = {FUSED: {"tasks": in_turn}, HF_PEFT: {"adapter_names": in_turn} if len(tasks) > 1 else {}}
        vocabulary = int(cast(PreTrainedModel, model).config.get_text_config().vocab_size)
        tokens = torch.randint(vocabulary, (batch, prompt), generator=random).to(compiled.device)
        rows = {name: Written(name, note=theirs.missing if module is None else "") for name, module in modules.items()}
        steps, texts = {}, {}
        for name, module in modules.items():
            if module is not None:
                with timings.stage(f"first texts: {name}"):
                    try:
                        texts[name] = _write(module, tokens, new, **options.get(name, {}))
                    except Exception as error:
                        if name != HF_PEFT:
                            raise
                        rows[name] = Written(name, note=headline(error))
                        continue
                steps[name] = partial(_write, module, tokens, new, **options.get(name, {}))
        with timings.stage("clock"):
            seconds = fastest(steps, repeats, compiled.device)
        with timings.stage("memory"):
            for name, step in steps.items():
                peak = peak_bytes(step, compiled.device)
                rows[name] = Written(name, seconds[name], batch * new / seconds[name], peak)
    if HF_PEFT in texts and not torch.equal(texts[HF_PEFT], texts[FUSED]):
        rows[HF_PEFT] = replace(rows[HF_PEFT], note="another text", agrees=False)
    return GenerationBench(
        model=compiled.plan.sites.model,
        spec="\n".join(row.statement for row in compiled.plan.rows),
        batch=batch, prompt=prompt, new=new,
        dtype=str(compiled.dtype).removeprefix("torch."),
        device=device_name(compiled.device),
        threads=thread_count, repeats=repeats, rows=tuple(rows.values()), versions=versions(),
    )  # fmt: skip


def _write(module: Any, tokens: Tensor, new: int, **options: Any) -> Tensor:
    written: Tensor = module.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new,
        do_sample=False, pad_token_id=0, **options,
    )  # fmt: skip
    return written


def generation_table(bench: GenerationBench) -> Group:
    """A row a variant: tokens a second, and the peak."""
    where = f"{bench.device}, {bench.threads} threads" if bench.threads > 1 else f"{bench.device}, one thread"
    title = (
        f"{bench.model}, {bench.dtype}, {bench.batch} × {bench.new} tokens behind {bench.prompt}, {where}, "
        f"fastest of {bench.repeats}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("text by", overflow="fold")
    for heading in ("time", "tokens/s", "×", "peak"):
        table.add_column(heading, justify="right")
    for row in bench.rows:
        ratio = bench.ratio(row)
        table.add_row(
            row.name,
            f"{row.seconds:.3f} s" if row.seconds else "–",
            f"{row.tokens:.2f}" if row.tokens else "–",
            f"{ratio:.2f}" if ratio else "",
            formatted_bytes(row.peak) if row.peak is not None else "–",
            style=None if row.agrees else "red",
        )
    notes = [Text(f"{row.name}: {row.note}") for row in bench.rows if row.note]
    return Group(table, *notes, Text(FOOTNOTE))
