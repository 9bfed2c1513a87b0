"""What can be wrong with a draft, one function a rule: statements that get into each other's way, and budgets.

A check is handed the whole draft and yields a diagnostic for everything that it finds. `CHECKS` is all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from peftc import language as ast
from peftc.capture.capture import Captured
from peftc.capture.convention import Convention
from peftc.diagnostics.diagnostic import Diagnostic
from peftc.diagnostics.source import Span
from peftc.planning import errors as say
from peftc.planning.gradients import never_learning
from peftc.planning.memory import Memory, formatted_bytes
from peftc.planning.packed_weight import PackedWeight
from peftc.planning.plan import Binding, Plan
from peftc.planning.positions_left import too_long
from peftc.planning.select import COMPARE
from peftc.protocol.method import Stage
from peftc.protocol.site import Projection, Site
from peftc.protocol.sites import Sites
from peftc.spec.budgets import Budget
from peftc.spec.resolve import Intentions


@dataclass(frozen=True)
class Draft:
    """What the statements of a spec come to on a model, one by one: not yet held against each other.

    `bindings` stand in file order. `named`: the sites of each `train` and `freeze` statement, by its number.
    """

    captured: Captured
    sites: Sites
    intentions: Intentions
    bindings: tuple[Binding, ...]
    trained: dict[str, Span]
    named: dict[int, list[Site]]
    packed: dict[str, PackedWeight]
    recomputed: dict[str, Span]


def same_method_twice(draft: Draft) -> Iterator[Diagnostic]:
    """One method on one site, by two statements: one error for each pair of them."""
    first: dict[tuple[str, str], Binding] = {}
    clashes: dict[tuple[int, int], list[tuple[Binding, Binding]]] = defaultdict(list)
    whole = {
        (b.method.label, b.site.weight): b
        for b in draft.bindings
        if isinstance(b.site, Projection) and not b.site.is_part
    }
    for binding in draft.bindings:
        site = binding.site
        earlier = first.setdefault((binding.method.label, site.name), binding)
        if isinstance(site, Projection) and site.is_part and earlier is binding:
            earlier = whole.get((binding.method.label, site.weight), binding)
        if earlier is not binding:
            pair = sorted((earlier, binding), key=lambda b: b.statement)
            clashes[pair[0].statement, pair[1].statement].append((pair[0], pair[1]))
    for pairs in clashes.values():
        earlier, later = pairs[0]
        yield say.SameMethodTwice(
            method=later.method.name, site=later.site.name, others=len(pairs) - 1, first=earlier.span, span=later.span
        )


def gated_twice(draft: Draft) -> Iterator[Diagnostic]:
    """Two gates over keys under one softmax: what either lets through would depend on the other."""
    first: dict[str, Binding] = {}
    for binding in draft.bindings:
        if binding.method.stage is Stage.ATTENTION and binding.method.has_gate:
            earlier = first.setdefault(binding.site.name, binding)
            if earlier is not binding:
                reason = f"{earlier.method.label} has a gate there, and keys of two gates would share one softmax"
                yield say.Refused(
                    method=binding.method.name, site=binding.site.name, reason=reason, others=0, span=binding.span
                )


def tied_apart(draft: Draft) -> Iterator[Diagnostic]:
    """A tied tensor trains only when all of its readers were named."""
    trainings = enumerate(draft.intentions.trainings)
    named = {site.name for number, training in trainings if training.on for site in draft.named[number]}
    for name, span in draft.trained.items():
        readers = [
            site for site in draft.sites
            if name in site.parameters and ("embed" in site.roles or (isinstance(site, Projection) and site.tied))
        ]  # fmt: skip
        missing = tuple(site.name for site in readers if site.name not in named)
        trains = tuple(site.name for site in readers if site.name in named)
        if missing and trains:
            yield say.TrainsTied(trains=trains, missing=missing, span=span)


def weight_claimed(draft: Draft) -> Iterator[Diagnostic]:
    """A method that needs the weight to itself shares it neither with another nor with `train`."""
    by_weight: dict[str, list[tuple[Binding, Projection]]] = defaultdict(list)
    for binding in draft.bindings:
        if isinstance(binding.site, Projection) and binding.method.stage is Stage.WEIGHT:
            by_weight[binding.site.weight].append((binding, binding.site))
    seen: set[tuple[Span, Span]] = set()
    for weight, sharing in by_weight.items():
        for one, site in sharing:
            reason = one.method.claims_weight()
            if not reason:
                continue
            overlapping = (other.span for other, at in sharing if other.span != one.span and site.overlaps(at))
            other = next(overlapping, draft.trained.get(weight))
            if other is not None and (one.span, other) not in seen:
                seen.add((one.span, other))
                yield say.WeightClaimed(
                    method=one.method.name, site=site.name, reason=reason, other=other, span=one.span
                )


def no_position_left(draft: Draft) -> Iterator[Diagnostic]:
    """Prompts and prefixes that leave no position for the input."""
    return too_long(draft.bindings)


def no_gradient(draft: Draft) -> Iterator[Diagnostic]:
    """What waits for a gradient that a method keeps from it."""
    return never_learning(draft.captured.module.graph, draft.bindings, draft.trained)


def cannot_agree(draft: Draft) -> Iterator[Diagnostic]:
    """Two passes can only be compared by logits."""
    convention = Convention(draft.captured.inputs, draft.captured.result)
    wanting = [binding for binding in draft.bindings if binding.method.consistency]
    if wanting and draft.captured.has_loss and not convention.logits:
        first = wanting[0]
        reason = "the model returns no logits to compare its two passes by: give consistency=0"
        yield say.Refused(
            method=first.method.name, site=first.site.name, reason=reason, others=len(wanting) - 1, span=first.span
        )


CHECKS: tuple[Callable[[Draft], Iterator[Diagnostic]], ...] = (
    same_method_twice, gated_twice, tied_apart, weight_claimed, no_position_left, no_gradient, cannot_agree,
)  # fmt: skip


def frozen_in_a_task(shared: Draft, tasks: Mapping[str, Draft]) -> Iterator[Diagnostic]:
    """What learns for all tasks learns for each."""
    for name, task in tasks.items():
        if kept := sorted(shared.trained.keys() - task.trained.keys()):
            trains = shared.trained[kept[0]]
            yield say.FrozenInATask(task=name, parameter=kept[0], trains=trains, span=_freezing(task, shared) or trains)


def _freezing(task: Draft, shared: Draft) -> Span | None:
    """The task's first own statement that freezes."""
    common = {training.span for training in shared.intentions.trainings}
    own = (item.span for item in task.intentions.trainings if not item.on and item.span not in common)
    return next(own, None)


def over_budget(plan: Plan, budget: Budget, memory_of: Callable[[int, int], Memory]) -> Diagnostic | None:
    """The error of a budget that `plan` does not keep, or None; `memory_of` a batch and a length is what it takes."""
    limit = budget.limit.scaled
    if budget.quantity == "memory":
        memory = memory_of(budget.arguments.get("batch", 1), budget.arguments.get("seq", 512))
        found, shown = float(memory.total), formatted_bytes(memory.total)
        breakdown = memory.lines()
    else:
        count = plan.trainable if budget.quantity == "trainable" else plan.total
        found = count / plan.total if budget.limit.unit == "%" else count
        shown = f"{count / plan.total:.4%} ({count:,})" if budget.limit.unit == "%" else f"{count:,}"
        breakdown = tuple(f"{row.parameters:>13,}  {row.statement}" for row in plan.rows)
    if COMPARE[budget.op](found, limit):
        return None
    return say.OverBudget(
        quantity=budget.quantity, found=shown, op=budget.op, limit=ast.unparse(budget.limit),
        breakdown=tuple(breakdown), span=budget.span,
    )  # fmt: skip
