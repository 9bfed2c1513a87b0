"""The plan of a batch whose rows are of several tasks: what all have in common, and what each does to its own rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import fx

from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.ir import expression, value
from peftc.planning.errors import NotByRow
from peftc.planning.plan import Binding, Plan
from peftc.planning.tasks.by_row import ByRow, Member
from peftc.protocol.method import Stage, State
from peftc.protocol.site import Block, Experts, Projection, Site

STAGES = (Stage.WEIGHT, Stage.OUTPUT, Stage.MODULE)
Place = tuple[str, Stage, bool, int]  # a site, a stage, whether it is about what enters, how many stand before


def by_row(plan: Plan, tasks: Sequence[Plan]) -> Plan:
    """The plan of batches whose rows are of one of `tasks` each.

    Args:
        plan: of what all tasks have in common.
        tasks: each with that; one may be there more than once.

    Raises:
        PeftcError: `not-by-row` for what cannot be told apart by row.
    """
    common = len(plan.intentions.applications)
    places: dict[Place, list[tuple[int, Binding]]] = defaultdict(list)
    for number, task in enumerate(tasks):
        counts: dict[tuple[str, Stage, bool], int] = defaultdict(int)
        own = [binding for binding in task.bindings if binding.statement >= common]
        _refuse(plan, task, own)
        for binding in own:
            method = binding.method
            what = binding.site.name, method.stage, method.rewrites_input(binding.site)
            places[(*what, counts[what])].append((number, binding))
            counts[what] += 1
    bindings, names = list(plan.bindings), dict(plan.by_row)
    for (*_, count), members in places.items():
        binding, own_names = _binding(members, count)
        bindings.append(binding)
        names |= own_names
    bindings.sort(key=lambda binding: binding.method.stage)
    return replace(plan, bindings=tuple(bindings), by_row=names)


def _binding(found: list[tuple[int, Binding]], count: int) -> tuple[Binding, dict[str, tuple[int, str]]]:
    """One binding for those of several tasks at one place, and its names of their tensors."""
    _, first = found[0]
    entering = first.method.rewrites_input(first.site)
    path = f"{first.path}_rows{count}{'_entering' * entering}"
    specs: dict[str, State] = {}
    members: list[Member] = []
    names: dict[str, tuple[int, str]] = {}
    for number, binding in found:
        called = {name: f"t{number}_{name}" for name in binding.names}
        specs |= {called[name]: binding.tensors[full] for name, full in binding.names.items()}
        names |= {f"{path}.{called[name]}": (number, full) for name, full in binding.names.items()}
        members.append(Member(number, binding.method, called))
    return Binding(first.statement, ByRow(members, specs), first.site, path, first.span), names


def _refuse(plan: Plan, task: Plan, own: list[Binding]) -> None:
    """Raises PeftcError where something of a task cannot be for some rows of a batch alone."""
    problems = [
        NotByRow(what=binding.method.name, site=binding.site.name, reason=reason, span=binding.span)
        for binding in own
        if (reason := _obstacle(binding, task)) is not None
    ]
    problems += [
        NotByRow(what="train", site=name, reason="all rows of a batch are computed with one weight", span=span)
        for name, span in task.trained.items()
        if name not in plan.trained
    ]
    problems += [
        NotByRow(
            what=item.storage.name, site=name, reason="all rows of a batch are computed with one weight", span=item.span
        )
        for name, item in task.packed.items()
        if name not in plan.packed
    ]
    seen = {(problem.what, problem.reason): problem for problem in reversed(problems)}
    if seen:
        raise PeftcError(*reversed(seen.values()))


def _obstacle(binding: Binding, task: Plan) -> str | None:
    method, site = binding.method, binding.site
    if method.stage not in STAGES:
        return "what it puts in front is in front of every row of a batch"
    if isinstance(site, Block):
        return "a chain of blocks is one for all rows of a batch"
    if isinstance(site, Experts):
        return "experts take tokens, and do not know which row one is of"
    if isinstance(site, Projection) and site.within:
        return "it changes a weight that an island reads, and all rows of a batch are computed with one weight"
    if isinstance(site, Projection) and method.prepares:
        return "it takes a part out of the frozen weight, which all rows of a batch share"
    if not all(_has_rows(node, task) for node in _values(site)):
        return "what it reads does not have the rows of the batch in front"
    return None


def _values(site: Site) -> Iterator[fx.Node]:
    yield from (
        (use.x for use in site.uses) if isinstance(site, Projection) else (*site.reads()[:1], *site.changes()[:1])
    )


def _has_rows(node: fx.Node, plan: Plan) -> bool:
    """Whether the first dimension of a value is the batch, or the batch times something."""
    shape = value(node).shape
    batch = next((fake.shape[0] for fake in plan.input_values if fake.dim()), None)
    if not len(shape) or not isinstance(batch, torch.SymInt) or not isinstance(shape[0], torch.SymInt):
        return False
    whole, rows = expression(shape[0]), expression(batch)
    return bool((whole / rows).is_integer) and rows in whole.free_symbols
