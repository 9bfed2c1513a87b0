"""The tables people read: what each statement matched and what it costs."""

from __future__ import annotations

import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from io import StringIO
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from peftc.diagnostics.diagnostic import among, listed
from peftc.files.repack import Rounding
from peftc.kernels.island import Island
from peftc.optimise.fuse import Fired
from peftc.planning.memory import Memory, formatted_bytes
from peftc.planning.plan import Plan
from peftc.protocol.combinator import Combinator
from peftc.protocol.method import Method, kinds, methods
from peftc.protocol.parameterisation import Parameterisation
from peftc.protocol.params import Configured, registered
from peftc.protocol.site import Site
from peftc.protocol.sites import Absence, Sites
from peftc.protocol.storage import Storage, storages

# Stages of a command that are not compiling, and the one that is torch.export and nothing else.
NOT_COMPILING = ("check", "load", "save", "merge")
EXPORT = "torch.export"
_LAYER = re.compile(r"\.\d+\b")  # the first number in a path


def report(plan: Plan, fired: Iterable[Fired] = ()) -> str:
    """The plan's table, and that of the fusions where there are any, as plain text."""
    told = tuple(fired)
    return rendered(plan_table(plan), *([fusions_table(told)] if told else []))


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
    task = None
    for row in plan.rows:
        if row.task != task:
            table.add_section()
            table.add_row(Text(f"task {row.task}"), "", "", "")
            task = row.task
        if row.packed is None:
            counts = f"{row.parameters:,}", f"{row.parameters / plan.total:.4%}"
        else:
            counts = f"{formatted_bytes(row.packed)}", f"of {formatted_bytes(row.dense)}"
        table.add_row(Text("  " * (task is not None) + row.statement), f"{row.sites:,}", *counts)
    table.add_section()
    table.add_row("all", "", f"{plan.trainable:,}", f"{plan.share:.4%}")
    differences = plan.captured.differences
    told = {
        "not in the checkpoint, drawn anew": differences.fresh,
        "in the checkpoint alone, unused": differences.unread,
    }
    lines = [f"{words}: {listed(names)}" for words, names in told.items() if names]
    if lines := [*lines, *_islands(plan.captured.islands)]:
        table.caption, table.caption_justify = Text("\n".join(lines)), "left"
    return table


def _islands(found: Iterable[Island]) -> Iterator[str]:
    """Which modules run their own code, and why; of those for one reason the first."""
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for island in found:
        alike[island.reason, island.where].append(island.path)
    for (reason, where), paths in alike.items():
        verb = "run their own code" if len(paths) > 1 else "runs its own code"
        yield f"{among(paths[0], len(paths) - 1)} {verb}: {reason}" + (f", at {where}" if where else "")


def fusions_table(fired: Iterable[Fired]) -> Table:
    """How often each fusion fired; of those that did not, where they came nearest and what stood in the way."""
    table = Table(title="fusions", title_justify="left")
    table.add_column("rule")
    for heading in ("fired", "places"):
        table.add_column(heading, justify="right")
    table.add_column("nearest miss", overflow="fold")
    for one in fired:
        table.add_row(one.rule, f"{one.count:,}", f"{one.places:,}", Text("" if one.count else one.missed))
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


def lost_table(lost: Mapping[str, Rounding]) -> Table:
    """What packing a merged weight again loses."""
    table = Table(title="merged, and rounded again", title_justify="left")
    table.add_column("weight", overflow="fold")
    for heading in ("largest error", "error / weight"):
        table.add_column(heading, justify="right")
    for name, rounding in lost.items():
        table.add_row(name, f"{rounding.largest:.3g}", f"{rounding.relative:.4%}")
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
    """Every method with its formula, sites, parameters and paper."""
    table = Table(show_lines=True)
    for heading in ("method", "formula", "attaches to", "parameters", "paper"):
        table.add_column(heading, overflow="fold")
    for name, cls in methods().items():
        table.add_row(name, cls.formula, _places(cls), ", ".join(cls.parameters), cls.paper)
    return table


def methods_markdown() -> str:
    """The registry as the README's table."""
    lines = ["| method | formula | attaches to | parameters | merges | paper |", "|---|---|---|---|---|---|"]
    for name, cls in methods().items():
        parameters = ", ".join(f"`{parameter}`" for parameter in cls.parameters)
        formula = cls.formula.replace("|", "\\|")
        lines.append(f"| `{name}` | {formula} | {_places(cls)} | {parameters} | {_merges(cls)} | {cls.paper} |")
    return "\n".join(lines)


def _places(cls: type[Method]) -> str:
    return " and ".join(kind.written for kind in kinds(cls))


def _merges(cls: type[Method]) -> str:
    if cls.unmergeable is not None:
        return "no"
    return "as its method" if issubclass(cls, Combinator) else "yes"


def parameterisations_markdown() -> str:
    """The ways of making a matrix, as the README's table."""
    lines = ["| matrix | formula | parameters | paper |", "|---|---|---|---|"]
    for name, cls in registered(Parameterisation).items():
        assert issubclass(cls, Parameterisation)
        parameters = ", ".join(f"`{parameter}`" for parameter in cls.parameters)
        lines.append(f"| `{name}` | {cls.formula} | {parameters} | {cls.paper} |")
    return "\n".join(lines)


def storages_table() -> Table:
    """Every storage with its formula, parameters and paper."""
    table = Table(title="quantize SELECTOR with", title_justify="left", show_lines=True)
    for heading in ("storage", "formula", "parameters", "paper"):
        table.add_column(heading, overflow="fold")
    for name, cls in storages().items():
        table.add_row(name, cls.formula, ", ".join(cls.parameters), cls.paper)
    return table


def storages_markdown() -> str:
    """How frozen weights may lie in memory, as the README's table; the bits are those of a weight of 4096 by 4096."""
    lines = ["| storage | formula | parameters | bits a weight | paper |", "|---|---|---|---|---|"]
    for name, cls in storages().items():
        parameters = ", ".join(f"`{parameter}`" for parameter in cls.parameters)
        settings = [{}, *({each: True} for each, parameter in cls.parameters.items() if parameter.kind is bool)]
        packed = [cls(**given).buffers((4096, 4096), torch.bfloat16).values() for given in settings]
        bits = ", ".join(f"{8 * sum(buffer.bytes for buffer in buffers) / 4096**2:.2f}" for buffers in packed)
        lines.append(f"| `{name}` | {cls.formula} | {parameters} | {bits} | {cls.paper} |")
    return "\n".join(lines)


def described_storages() -> list[dict[str, Any]]:
    """The storages as plain data."""
    return [
        {"name": name, "summary": inspect.getdoc(cls), "formula": cls.formula, "paper": cls.paper,
         "parameters": _described_parameters(cls)}
        for name, cls in storages().items()
    ]  # fmt: skip


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
            "parameters": _described_parameters(cls),
        }
        for name, cls in methods().items()
    ]


def _described_parameters(cls: type[Configured]) -> dict[str, dict[str, Any]]:
    return {
        parameter.name: {
            "default": None if parameter.required else parameter.default,
            "required": parameter.required,
            "doc": parameter.doc,
            "expects": parameter.expects,
            **({"alias": parameter.alias} if parameter.alias else {}),
        }
        for parameter in cls.parameters.values()
    }


def method_page(cls: type[Method]) -> Group:
    """One method: what it is, and each parameter."""
    merges = "can be merged" if cls.unmergeable is None else f"cannot be merged: {cls.unmergeable}"
    return _page(cls, (cls.formula, cls.paper, f"attaches to {_places(cls)}", merges))


def storage_page(cls: type[Storage]) -> Group:
    """One storage: what it is, and each parameter."""
    return _page(cls, (cls.formula, cls.paper))


def _page(cls: type[Configured], facts: tuple[str, ...]) -> Group:
    table = Table("parameter", "default", "meaning", "expects")
    for parameter in cls.parameters.values():
        name = f"{parameter.name} ({parameter.alias})" if parameter.alias else parameter.name
        shown = "required" if parameter.required else _default(parameter.default)
        table.add_row(name, shown, parameter.doc, parameter.expects)
    lines = (f"{cls.name}: {inspect.getdoc(cls)}", *(f"  {fact}" for fact in facts if fact))
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


def absences(sites: Sites, *, every: bool) -> Table | None:
    """What has no role and why, one row for those that differ in the numbers of their layers alone, unless `every`."""
    rows: dict[tuple[str, ...], list[Absence]] = defaultdict(list)
    for found in sites.absent:
        texts = found.name, found.reason
        rows[texts if every else tuple(_LAYER.sub("", text, count=1) for text in texts)].append(found)
    table = Table("no role", "why")
    for first, *more in rows.values():
        table.add_row(first.name + (f"  (one of {len(more) + 1})" if more else ""), first.reason)
    return table if rows else None


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
