"""Intentions x sites -> a plan, with every semantic error reported at once.

Statements become a draft, checks say what is wrong with it, and of a draft without fault a plan is made.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from math import prod

from peftc import language as ast
from peftc.capture.capture import Captured
from peftc.diagnostics.diagnostic import Diagnostic, PeftcError, choices, in_file_order
from peftc.diagnostics.source import Span
from peftc.kernels.island import island_of
from peftc.planning import errors as say
from peftc.planning.checks import CHECKS, Draft, frozen_in_a_task, over_budget
from peftc.planning.cost import Step
from peftc.planning.fitting.fit import fitted
from peftc.planning.packing import packed_weights
from peftc.planning.plan import Binding, Plan, StatementCost
from peftc.planning.recompute import recomputed
from peftc.planning.select import Selection
from peftc.planning.tasks.rows import by_row
from peftc.protocol.method import Data, Method, Stage, State, kinds, methods
from peftc.protocol.operands import changes_a_weight
from peftc.protocol.params import check_registered
from peftc.protocol.site import Attention, Block, Experts, Projection, Sequence, Site, Sublayer
from peftc.protocol.sites import Sites
from peftc.roles.stacks import linked
from peftc.spec.resolve import Application, Intentions, Training
from peftc.spec.tasks import tasks_of


def make_plan(captured: Captured, sites: Sites, intentions: Intentions) -> Plan:
    """Matches what a spec wants, and each of its tasks, against what a model offers.

    Raises:
        PeftcError: with all semantic errors at once.
    """
    check_registered()
    if intentions.fits:
        return fitted(intentions, partial(make_plan, captured, sites))
    if intentions.rows:
        common = make_plan(captured, sites, replace(intentions, rows=()))
        return replace(
            by_row(common, [make_plan(captured, sites, one) for one in intentions.rows]), intentions=intentions
        )
    problems: list[Diagnostic] = []
    select = Selection(sites)
    drafts = {name: _drafted(captured, select, one, problems) for name, one in intentions.tasks.items()}
    draft = _drafted(captured, select, intentions, problems)
    problems += frozen_in_a_task(draft, drafts)
    places = {task.name.text: task.name.span for task in tasks_of(intentions.spec.statements)}
    for name, each in (drafts or {"": draft}).items():
        if not (each.bindings or each.trained or problems or each.intentions.may_be_empty):
            problems.append(say.NothingTrains(task=name, span=places.get(name) or _last(each.intentions.spec)))
    if not problems:
        plan = with_tasks(_plan(draft), {name: _plan(one) for name, one in drafts.items()})
        problems += over_budgets(plan)
    if problems:
        raise PeftcError(*in_file_order(dict.fromkeys(problems)))  # what tasks have in common is wrong in each
    return plan


def _drafted(captured: Captured, select: Selection, intentions: Intentions, problems: list[Diagnostic]) -> Draft:
    """The draft of a spec without tasks; what is wrong with it is added to `problems`."""
    select.problems = []
    drafting = _Drafting(captured, select, intentions)
    draft = drafting.draft()
    problems += (*drafting.problems, *(problem for check in CHECKS for problem in check(draft)))
    return draft


def _plan(draft: Draft) -> Plan:
    ordered = tuple(sorted(draft.bindings, key=lambda binding: binding.method.stage))
    graph, blocks = draft.captured.module.graph, draft.sites.blocks
    return Plan(
        intentions=draft.intentions,
        captured=draft.captured,
        sites=draft.sites,
        bindings=ordered,
        trained=draft.trained,
        rows=tuple(_rows(draft)),
        packed=draft.packed,
        recomputed=draft.recomputed,
        kept=Step(graph, blocks, ordered, draft.trained, draft.recomputed).kept(),
    )


def over_budgets(plan: Plan) -> Iterator[Diagnostic]:
    """The errors of all budgets that a plan and its tasks do not keep."""
    common = plan.intentions.budgets
    for one in (plan, *plan.tasks.values()):
        memory_of = cache(one.memory)
        budgets = (budget for budget in one.intentions.budgets if one is plan or budget not in common)
        yield from filter(None, (over_budget(one, budget, memory_of) for budget in budgets))


def with_tasks(plan: Plan, tasks: dict[str, Plan]) -> Plan:
    """A plan of what all tasks have in common, and these; behind the rows of the one stand each task's own."""
    common = tuple(row for row in plan.rows if row.task is None)
    own = (replace(row, task=name) for name, task in tasks.items() for row in _beyond(common, task.rows))
    return replace(plan, rows=(*common, *own), tasks=tasks)


def _beyond(common: tuple[StatementCost, ...], rows: tuple[StatementCost, ...]) -> Iterator[StatementCost]:
    left = list(common)
    for row in rows:
        if row in left:
            left.remove(row)
        else:
            yield row


def _rows(draft: Draft) -> Iterator[StatementCost]:
    """The report: what lies packed, as that pass is the first; methods, existing parameters, recomputed blocks."""
    intentions = draft.intentions
    for number, packing in enumerate(intentions.packings):
        mine = [item for item in draft.packed.values() if item.statement == number]
        packed, dense = sum(item.bytes for item in mine), sum(item.dense_bytes for item in mine)
        yield StatementCost(_one_line(packing.span), len(mine), 0, packed, dense)
    for number, application in enumerate(intentions.applications):
        bindings = [binding for binding in draft.bindings if binding.statement == number]
        tensors = {name: state for binding in bindings for name, state in binding.tensors.items()}
        count = sum(prod(state.shape) for state in tensors.values() if state.trainable)
        yield StatementCost(_one_line(application.span), len(bindings), count)
    for number, training in enumerate(intentions.trainings):
        if training.on:
            found = draft.named[number]
            parameters = {name for site in found for name in _whole_parameters(site)}
            count = sum(draft.sites.parameters[name] for name in parameters)
            yield StatementCost(_one_line(training.span), len(found), count)
    for item in intentions.recomputings:
        yield StatementCost(_one_line(item.span), sum(span == item.span for span in draft.recomputed.values()), 0)


class _Drafting:
    """Statements x sites -> a draft; what cannot be matched or attached is among `problems`."""

    def __init__(self, captured: Captured, select: Selection, intentions: Intentions) -> None:
        self.captured = captured
        self.sites = select.sites
        self.intentions = intentions
        self.select = select
        self.problems = select.problems

    def draft(self) -> Draft:
        """All statements, matched in file order by kind."""
        bindings = tuple(
            binding
            for number, application in enumerate(self.intentions.applications)
            for binding in self._bind(number, application)
        )
        trained, named = self._trained()
        statements = [(item, self.select(item.target, parameters=True)) for item in self.intentions.packings]
        packed, problems = packed_weights(self.captured, statements, trained)
        self.problems += problems
        again = recomputed(self.intentions.recomputings, self.select, self.problems)
        return Draft(self.captured, self.sites, self.intentions, bindings, trained, named, packed, again)

    # Methods

    def _bind(self, number: int, application: Application) -> list[Binding]:
        method = application.method
        found = self.select(application.target) if application.target else self._sequences(application)
        wrong = [site for site in found if not isinstance(site, method.site)]
        fitting = linked([site for site in found if isinstance(site, method.site)])
        if wrong:
            self._wrong_site(application, wrong)
        refused = self._refused(application, fitting)
        if wrong or refused or not fitting:
            return []  # and it was said why
        shares = method.shares(fitting)
        home = self._free(f"{method.label}_{number}" if number else method.label) if any(shares) else ""
        return [
            Binding(number, method, site, self._path(method, site), application.span, names, own)
            for site, names, own in zip(fitting, shared_names(home, shares), shares, strict=True)
        ]

    def _refused(self, application: Application, sites: list[Site]) -> bool:
        """Whether the method cannot attach to some of its sites: one problem for each reason."""
        method = application.method
        reasons: dict[str, list[Site]] = defaultdict(list)
        for site in sites:
            if reason := _obstacle(site, method) or method.refuses(site):
                reasons[reason].append(site)
        self.problems += [
            say.Refused(
                method=method.name, site=refused[0].name, reason=reason, others=len(refused) - 1, span=application.where
            )
            for reason, refused in reasons.items()
        ]
        return bool(reasons)

    def _sequences(self, application: Application) -> list[Site]:
        if not self.sites.sequences:
            self.problems.append(
                say.NoSequence(method=application.method.name, model=self.sites.model, span=application.span)
            )
        return list(self.sites.sequences)

    def _wrong_site(self, application: Application, wrong: list[Site]) -> None:
        """Of experts it says which methods take them: other models have linear layers where they stand."""
        if application.method.site is Sequence:
            self.problems.append(say.TakesNoTarget(method=application.method.name, span=application.where))
            return
        only_experts = all(isinstance(site, Experts) for site in wrong)
        self.problems.append(
            say.WrongSite(
                method=application.method.name,
                wants=choices([kind.nouns for kind in kinds(application.method)], "and"),
                site=wrong[0].name,
                site_kind=wrong[0].noun,
                others=len(wrong) - 1,
                instead=tuple(name for name, cls in methods().items() if only_experts and Experts in kinds(cls)),
                span=application.where,
            )
        )

    def _path(self, method: Method, site: Site) -> str:
        """A module name for the state that nothing in the base model has."""
        part = re.sub(r"[^A-Za-z0-9_]+", "_", site.name[len(site.path) :]).strip("_")
        return self._free(".".join(filter(None, (site.path, method.label + (f"_{part}" if part else "")))))

    def _free(self, path: str) -> str:
        while any(name == path or name.startswith(f"{path}.") for name in self.sites.parameters):
            path += "_"
        return path

    # Existing parameters

    def _trained(self) -> tuple[dict[str, Span], dict[int, list[Site]]]:
        """Existing parameters that learn, after every `train` and `freeze`; and the sites that each statement names."""
        trained: dict[str, Span] = {}
        named: dict[int, list[Site]] = {}
        for number, training in enumerate(self.intentions.trainings):
            named[number] = found = self.select(training.target, parameters=True)
            self._refuse_slices(found, training, trained)
            parameters = dict.fromkeys(name for site in found for name in _whole_parameters(site))
            if training.on:
                trained |= dict.fromkeys(parameters, training.span)
            else:
                trained = {name: span for name, span in trained.items() if name not in parameters}
        return trained, named

    def _refuse_slices(self, found: list[Site], training: Training, trained: dict[str, Span]) -> None:
        """A part of a weight cannot learn by itself, nor be frozen out of a weight that learns."""
        for site in found:
            if isinstance(site, Projection) and site.is_part and (training.on or site.weight in trained):
                self.problems.append(say.TrainsASlice(site=site.name, weight=site.weight, span=training.target.span))
                return


def shared_names(home: str, shares: list[dict[str, State]]) -> list[dict[str, str]]:
    """The full names of what sites share, site by site; of a tensor that there is more than once, all are numbered."""
    copies: dict[str, dict[int, int]] = defaultdict(dict)
    for own in shares:
        for name, spec in own.items():
            copies[name].setdefault(id(spec), len(copies[name]))
    return [
        {
            name: f"{home}.{name}" + (f"_{copies[name][id(spec)]}" if len(copies[name]) > 1 else "")
            for name, spec in own.items()
        }
        for own in shares
    ]


def _obstacle(site: Site, method: Method) -> str | None:
    """Why no method at all fits there, or this one does not."""
    if isinstance(site, Projection) and site.within:
        return _obstacle_within(site, method)
    if isinstance(site, Projection) and site.mixed:
        return "its weight is applied in two ways (transposed, or with another bias), which one change cannot serve"
    if isinstance(site, Sublayer | Block) and site.repeated:
        return "it runs more than once, and only linear layers take a change at each of their runs"
    if isinstance(site, Attention):
        return site.obstacle if method.stage is Stage.ATTENTION else None
    return site.obstacle if isinstance(site, Sequence) else None


def _obstacle_within(site: Projection, method: Method) -> str | None:
    """Why the method cannot act on a weight that modules read which are not traced."""
    island = island_of(site.within[0])
    why = f"it is in {island.path}, which runs its own code ({island.reason})"
    if site.uses or site.mixed:
        return f"{why}, and its weight is also read elsewhere, or with another bias"
    if method.data is Data.INPUTS:
        return f"{why}, and what enters it is not seen"
    if method.adds_bias(site) and site.bias is None:
        return f"{why}, and it has no bias"
    if not changes_a_weight(method, site):
        return f"{why}: only changes of its weight reach it, without dropout or gates"
    return None


def _whole_parameters(site: Site) -> tuple[str, ...]:
    """What trains where the site does; of a part of a weight, nothing."""
    return () if isinstance(site, Projection) and site.is_part else site.parameters


def _last(spec: ast.Spec) -> Span:
    """The last statement of a spec, or where one would stand."""
    return spec.statements[-1].span if spec.statements else Span(spec.source, 0, 0)


def _one_line(span: Span) -> str:
    return " ".join(span.source.text[span.start : span.end].split())
