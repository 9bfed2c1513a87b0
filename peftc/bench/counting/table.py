"""The table that `peftc bench --count` prints."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from peftc.bench.counting.cards import LAUNCH, kinds
from peftc.bench.counting.count import Counted, Counts
from peftc.bench.variants import HF_PEFT
from peftc.show.beside import Beside

MOST = 10  # kinds of launch, in what is printed of them
FOOTNOTE = (
    "Counted, not measured: nothing ran on a GPU. A step is forward and backward in eager mode, without an optimiser; "
    "× is over HF PEFT's. A launch is one operation of ATen or one Triton kernel; its bytes: each operand once; "
    "FLOPs are of products only. Waits: how often the host waits for a value of the device."
)


def count_table(counts: Counts, verbose: bool = False) -> Group:
    """A row a variant: launches, bytes and operations, each beside its ratio to HF PEFT's.

    With `verbose`, for each variant the kinds with the most launches and those with the most bytes.
    """
    size = f"batch {counts.batch} × {counts.seq}" if counts.seq else f"batch {counts.batch}"
    dtype = str(counts.dtype).removeprefix("torch.")
    estimate = () if counts.card is None else ("estimate",)
    table = Beside(
        f"{counts.model}, {dtype}, {size}, counted", "step", ("launches", "GB moved", "TFLOP", *estimate), ("waits",)
    )
    for row in counts.rows:
        table.add(row.name, *_cells(counts, row))
    notes = [Text(f"{row.name}: {row.note}") for row in counts.rows if row.note]
    more = [_kinds(row, place) for row in counts.rows if row.launches for place in (1, 2)] if verbose else []
    return Group(table, *notes, *more, Text(FOOTNOTE), *_about_the_estimate(counts))


def _cells(counts: Counts, row: Counted) -> list[tuple[str, str]]:
    figures = {
        "total": row.total is not None and f"{row.total:,}",
        "bytes": row.bytes is not None and f"{row.bytes / 1e9:.2f}",
        "flops": row.flops is not None and f"{row.flops / 1e12:.2f}",
    }
    cells = [(figure or "–", _ratio(counts, row, name)) for name, figure in figures.items()]
    if counts.card is not None:
        seconds = counts.seconds(row)
        cells.append(("–" if seconds is None else f"{seconds * 1e3:.1f} ms", _ratio(counts, row, "seconds")))
    return [*cells, ("–" if row.launches is None else str(row.waits), "")]


def _ratio(counts: Counts, row: Counted, quantity: str) -> str:
    ratio = counts.ratio(row, quantity, HF_PEFT)
    return "" if ratio is None else f"{ratio:.2f}"


def _kinds(row: Counted, place: int) -> Table:
    """The kinds of a row with the most launches (1) or bytes (2)."""
    table = Table(title=f"{row.name}: most {('launches', 'bytes')[place - 1]}", title_justify="left")
    table.add_column("kind")
    for heading in ("launches", "GB moved", "TFLOP"):
        table.add_column(heading, justify="right")
    for name, launches, moved, flops in sorted(kinds(row.launches or {}), key=lambda kind: -int(kind[place]))[:MOST]:
        table.add_row(name, f"{launches:,}", f"{moved / 1e9:.2f}", f"{flops / 1e12:.2f}")
    return table


def _about_the_estimate(counts: Counts) -> list[Text]:
    card = counts.card
    if card is None:
        return []
    rate = card.rate(counts.dtype)
    text = (
        f"The estimate for {card.name}: each launch takes what its bytes need at {card.bandwidth / 1e12:g} TB/s or its "
        f"products at {rate / 1e12:g} TFLOP/s, all in the model's precision, and {LAUNCH * 1e6:g} µs beside that."
    )
    return [Text(text)]
