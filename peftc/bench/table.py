"""The table that `peftc bench` prints."""

from __future__ import annotations

from rich.console import Group
from rich.text import Text

from peftc.bench.bench import Bench, Measured
from peftc.planning.memory import formatted_bytes
from peftc.show.beside import Beside

FOOTNOTE = (
    "A step is forward and backward, without an optimiser; × is of the first row. Saved: what autograd keeps for the "
    "backward, parameters aside. Peak: the most that a step allocates above what stays. FLOPs: of products only. "
    "One library: products as PyTorch multiplies by itself; else each by the way that is soonest here."
)


def bench_table(bench: Bench) -> Group:
    """A row a variant: time, saved bytes, peak and operations, each beside its ratio to the frozen base's."""
    size = f"batch {bench.batch} × {bench.seq}" if bench.seq else f"batch {bench.batch}"
    where = f"{bench.device}, {bench.threads} threads" if bench.threads > 1 else f"{bench.device}, one thread"
    title = f"{bench.model}, {bench.dtype}, {size}, {where}, fastest of {bench.repeats}"
    table = Beside(title, "step", ("time", "saved", "peak", "GFLOP"), ("loss",))
    for row in bench.rows:
        table.add(row.name, *_cells(bench, row), style="" if row.agrees else "red")
    notes = [Text(f"{row.name}: {row.note}") for row in bench.rows if row.note]
    return Group(table, *notes, Text(FOOTNOTE))


def _cells(bench: Bench, row: Measured) -> list[tuple[str, str]]:
    figures = {
        "seconds": row.seconds and f"{row.seconds:.4f} s",
        "saved": row.saved is not None and formatted_bytes(row.saved),
        "peak": row.peak is not None and formatted_bytes(row.peak),
        "flops": row.flops is not None and f"{row.flops / 1e9:.2f}",
    }
    ratios = {name: bench.ratio(row, name) for name in figures}
    cells = [(figure or "–", "" if ratios[name] is None else f"{ratios[name]:.2f}") for name, figure in figures.items()]
    return [*cells, (f"{row.loss:.5f}" if row.loss is not None else "–", "")]
