"""The tables people read: what each statement matched and what it costs."""

from __future__ import annotations

import inspect
import sys
from io import StringIO
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from peftc.cost import Memory, formatted_bytes
from peftc.method import Method, kinds, methods
from peftc.planning import Plan
from peftc.site import Site, Sites

# Stages of a command that are not compiling, and the one that is torch.export and nothing else.
NOT_COMPILING = ("check", "load", "save", "merge")
EXPORT = "torch.export"


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
        table.add_row(
            Text(row.statement), f"{row.sites:,}", f"{row.parameters:,}", f"{row.parameters / plan.total:.4%}"
        )
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


def timings_table(seconds: dict[str, float]) -> Table:
    """Seconds by stage, and what the whole costs over `torch.export` alone."""
    table = Table(title="timings", title_justify="left")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for stage, spent in seconds.items():
        table.add_row(stage, f"{spent:.2f}")
    table.add_section()
    compiling = sum(spent for stage, spent in seconds.items() if stage not in NOT_COMPILING)
    table.add_row("compile", f"{compiling:.2f}")
    table.add_row("compile / torch.export", f"{compiling / seconds[EXPORT]:.2f}")
    return table


def methods_table() -> Table:
    """Every method with its formula and paper."""
    table = Table(show_lines=True)
    for heading in ("method", "formula", "parameters", "paper"):
        table.add_column(heading, overflow="fold")
    for item in described_methods():
        table.add_row(item["name"], item["formula"], ", ".join(item["parameters"]), item["paper"])
    return table


def methods_markdown() -> str:
    """The registry as the README's table."""
    lines = ["| method | formula | parameters | merges | paper |", "|---|---|---|---|---|"]
    for item in described_methods():
        parameters = ", ".join(f"`{name}`" for name in item["parameters"])
        merges = "yes" if item["merges"] else "no"
        lines.append(f"| `{item['name']}` | {item['formula']} | {parameters} | {merges} | {item['paper']} |")
    return "\n".join(lines)


def described_methods() -> list[dict[str, Any]]:
    """The registry as plain data."""
    return [
        {
            "name": name,
            "summary": inspect.getdoc(cls),
            "formula": cls.formula,
            "paper": cls.paper,
            "site": kinds(cls)[0].kind,
            "sites": [kind.kind for kind in kinds(cls)],
            "merges": cls.unmergeable is None,
            "parameters": {
                parameter.name: {
                    "default": parameter.default,
                    "doc": parameter.doc,
                    "expects": parameter.expects,
                    **({"alias": parameter.alias} if parameter.alias else {}),
                }
                for parameter in cls.parameters.values()
            },
        }
        for name, cls in methods().items()
    ]


def method_page(cls: type[Method]) -> Group:
    """One method: what it is, and each parameter."""
    table = Table("parameter", "default", "meaning", "expects")
    for parameter in cls.parameters.values():
        name = f"{parameter.name} ({parameter.alias})" if parameter.alias else parameter.name
        table.add_row(name, _default(parameter.default), parameter.doc, parameter.expects)
    merges = "can be merged" if cls.unmergeable is None else f"cannot be merged: {cls.unmergeable}"
    lines = (f"{cls.name}: {inspect.getdoc(cls)}", f"  {cls.formula}", f"  {cls.paper}", f"  {merges}")
    return Group(*(Text(line) for line in lines), table)


def _default(default: Any) -> str:
    return "" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def sites_tree(sites: Sites, *, every: bool) -> Tree:
    """Sites under the blocks they belong to; of equal layers only the first, unless `every`."""
    tree = Tree(Text(sites.model))
    shown: dict[str, Tree] = {}
    first = {stack: layer for layer, stack in sorted(_layers(sites), reverse=True)}
    for site in sites:
        if not every and site.layer is not None and site.layer != first[site.stack or ""]:
            continue
        parent = tree
        if site.block is not None:
            if site.block not in shown:
                count = sum(1 for _, stack in _layers(sites) if stack == (site.stack or ""))
                more = f"  (one of {count} layers)" if not every and count > 1 else ""
                shown[site.block] = tree.add(Text(site.block + more))
            parent = shown[site.block]
        if site.name != site.block:
            parent.add(_site_line(site))
    return tree


def _layers(sites: Sites) -> set[tuple[int, str]]:
    return {(site.layer, site.stack or "") for site in sites if site.layer is not None}


def _site_line(site: Site) -> Text:
    name = site.name.removeprefix(f"{site.block}.") if site.block else site.name
    facts = site.facts()
    shape = f"  {facts['in_features']} -> {facts['out_features']}" if "in_features" in facts else ""
    return Text.assemble(name, (f"  {', '.join(sorted(site.roles))}", "cyan"), (shape, "dim"))


def print_all(*items: RenderableType) -> None:
    """Prints to standard output; wide enough not to cut names where it is no terminal."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for item in items:
        console.print(Text(item) if isinstance(item, str) else item)
