"""A table of figures, each beside its ratio to one row's, that keeps every digit in a narrow terminal."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

UNBOUNDED = 10_000  # columns


@dataclass
class Beside:
    """Rows of figures with their ratios. Where the terminal is too narrow, a ratio stands below its figure.

    `compared` are the headings of figures that have a ratio, `alone` of those that have none.
    """

    title: str
    first: str
    compared: tuple[str, ...]
    alone: tuple[str, ...] = ()
    rows: list[tuple[str, tuple[tuple[str, str], ...], str]] = field(default_factory=list)

    def add(self, name: str, *cells: tuple[str, str], style: str = "") -> None:
        """A row: a figure and its ratio, or "", for each heading."""
        self.rows.append((name, cells, style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = self._table(stacked=False)
        fits = console.measure(wide, options=options.update(max_width=UNBOUNDED)).maximum <= options.max_width
        yield wide if fits else self._table(stacked=True)

    def _table(self, *, stacked: bool) -> Table:
        table = Table(title=self.title, title_justify="left", show_lines=stacked)
        table.add_column(self.first, overflow="fold")
        for heading in self.compared:
            table.add_column(f"{heading}\n×" if stacked else heading, justify="right", no_wrap=True)
            if not stacked:
                table.add_column("×", justify="right", no_wrap=True)
        for heading in self.alone:
            table.add_column(heading, justify="right", no_wrap=True)
        for name, cells, style in self.rows:
            compared, alone = cells[: len(self.compared)], [figure for figure, _ in cells[len(self.compared) :]]
            shown = (
                ["\n".join(filter(None, cell)) for cell in compared]
                if stacked
                else [c for cell in compared for c in cell]
            )
            table.add_row(name, *shown, *alone, style=style or None)
        return table
