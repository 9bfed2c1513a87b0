"""The tables people read: what each statement matched and what it costs."""

from __future__ import annotations

from io import StringIO

from rich.console import Console, RenderableType
from rich.table import Table

from peftc.cost import Memory, formatted_bytes
from peftc.plan import Plan


def report(plan: Plan) -> str:
    """The plan's table as plain text."""
    return rendered(plan_table(plan))


def rendered(*items: RenderableType, width: int = 110) -> str:
    """What rich draws, as plain text."""
    buffer = StringIO()
    console = Console(file=buffer, width=width, color_system=None, legacy_windows=False)
    for item in items:
        console.print(item)
    return buffer.getvalue().rstrip("\n")


def plan_table(plan: Plan) -> Table:
    """Statement, sites matched, parameters, share of all."""
    table = Table(title=f"{plan.sites.model}: {plan.total:,} parameters", title_justify="left")
    table.add_column("statement", overflow="fold")
    for heading in ("sites", "trainable", "share"):
        table.add_column(heading, justify="right")
    for row in plan.rows:
        table.add_row(row.statement, f"{row.sites:,}", f"{row.parameters:,}", f"{row.parameters / plan.total:.4%}")
    table.add_section()
    table.add_row("all", "", f"{plan.trainable:,}", f"{plan.share:.4%}")
    return table


def memory_table(memory: Memory, batch: int, seq: int, optimizer: str) -> Table:
    """Bytes of a training step by kind."""
    table = Table(title=f"one step: batch {batch}, sequence {seq}, {optimizer}", title_justify="left")
    table.add_column("kind")
    table.add_column("memory", justify="right")
    for name, size in memory.to_json().items():
        table.add_row(name, formatted_bytes(size))
    table.add_section()
    table.add_row("all", formatted_bytes(memory.total))
    return table
