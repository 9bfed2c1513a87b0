"""The tables people read: what each statement matched and what it costs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from peftc.diagnostics.diagnostic import among, listed
from peftc.files.repack import Rounding
from peftc.kernels.island import Island
from peftc.optimise.fuse import Fired
from peftc.planning.memory import Memory, formatted_bytes
from peftc.planning.plan import Plan
from peftc.protocol.site import Site
from peftc.protocol.sites import Absence, Sites
from peftc.show.screen import rendered

# Stages of a command that are not compiling, and the one that is torch.export and nothing else.
NOT_COMPILING = ("check", "load", "save", "merge")
EXPORT = "torch.export"
MOST_LOST = 10  # weights that are told of one by one
_LAYER = re.compile(r"\.\d+\b")  # the first number in a path


def report(plan: Plan, fired: Iterable[Fired] = ()) -> str:
    """The plan's table, and that of the fusions where there are any, as plain text."""
    fusions = fusions_table(fired)
    return rendered(plan_table(plan), *([fusions] if fusions else []))


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
        table.add_row(Text("  " * (task is not None) + row.statement), f"{row.sites:,}", *row.told(plan.total))
    table.add_section()
    table.add_row("all", "", f"{plan.trainable:,}", f"{plan.share:.4%}")
    differences = plan.captured.differences
    told = {
        "not in the checkpoint, drawn anew": differences.fresh,
        "in the checkpoint alone, unused": differences.unread,
    }
    lines = [f"{words}: {listed(names)}" for words, names in told.items() if names]
    if lines := [*_fitted(plan), *lines, *_islands(plan.captured.islands)]:
        table.caption, table.caption_justify = Text("\n".join(lines)), "left"
    return table


def _fitted(plan: Plan) -> Iterator[str]:
    """What was chosen for each `fit`, and what that costs; statements that it chose are rows of the table."""
    for one in plan.fitted:
        yield f"{one.statement}: {one.told}"


def _islands(found: Iterable[Island]) -> Iterator[str]:
    """Which modules run their own code, and why; of those for one reason the first."""
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for island in found:
        alike[island.reason, island.where].append(island.path)
    for (reason, where), paths in alike.items():
        verb = "run their own code" if len(paths) > 1 else "runs its own code"
        yield f"{among(paths[0], len(paths) - 1)} {verb}: {reason}" + (f", at {where}" if where else "")


def fusions_table(fired: Iterable[Fired], *, every: bool = False) -> Table | None:
    """How often each fusion fired; of those that did not, where they came nearest and what stood in the way.

    Without `every`, of those that did not only such as the model, or the spec, has something for. None if none is left.
    """
    table = Table(title="fusions", title_justify="left")
    table.add_column("rule")
    for heading in ("fired", "places"):
        table.add_column(heading, justify="right")
    table.add_column("nearest miss", overflow="fold")
    for one in (one for one in fired if every or one.count or one.telling):
        table.add_row(one.rule, f"{one.count:,}", f"{one.places:,}", Text("" if one.count else one.missed))
    return table if table.rows else None


def memory_table(memory: Memory, batch: int, seq: int, optimizer: str) -> Table:
    """Bytes of a training step by kind."""
    title = f"one step: batch {batch}, sequence {seq}, {optimizer}"
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("kind")
    table.add_column("memory", justify="right")
    for name, size in memory.to_json().items():
        table.add_row(name, formatted_bytes(size))
    table.add_section()
    table.add_row("all", formatted_bytes(memory.total))
    return table


def lost_table(lost: Mapping[str, Rounding]) -> Table:
    """What packing a merged weight again loses; of many, the weights that lose the most."""
    table = Table(title="merged, and rounded again", title_justify="left")
    table.add_column("weight", overflow="fold")
    for heading in ("largest error", "error / weight"):
        table.add_column(heading, justify="right")
    worst = sorted(lost, key=lambda name: lost[name].relative, reverse=True)
    kept, rest = {*worst[:MOST_LOST]}, worst[MOST_LOST:]
    for name, rounding in lost.items():
        if name not in kept:
            continue
        table.add_row(name, f"{rounding.largest:.3g}", f"{rounding.relative:.4%}")
    if rest:
        largest = max(lost[name].largest for name in rest)
        table.add_section()
        table.add_row(f"{len(rest):,} more, at most", f"{largest:.3g}", f"{lost[rest[0]].relative:.4%}")
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
