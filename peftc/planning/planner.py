"""Intentions x sites -> an ordered tuple of bindings, with every semantic error reported at once.

A plan knows everything about the compiled model but its numbers: what attaches where, which tensors there will be,
how many parameters learn, and how much memory a training step needs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch

from peftc.capture.capture import Captured
from peftc.capture.convention import Convention
from peftc.diagnostics.diagnostic import Diagnostic, PeftcError, choices, in_file_order
from peftc.diagnostics.source import Span
from peftc.language import syntax as ast
from peftc.planning import errors as say
from peftc.planning.cost import Kept, Memory, estimate, formatted_bytes, kept_for_backward
from peftc.planning.gradients import never_learning
from peftc.planning.packed_weight import Stored
from peftc.planning.packing import stored_weights
from peftc.planning.positions_left import too_long
from peftc.planning.recompute import recomputed
from peftc.planning.select import COMPARE, Selection
from peftc.protocol.method import Method, Stage, State, kinds, methods
from peftc.protocol.site import Attention, Block, Experts, Linear, Module, Projection, Sequence, Site, Sites
from peftc.rewrite.blocks import linked
from peftc.spec.resolve import Application, Budget, Training, resolve

KINDS: dict[type[Site], str] = {
    Linear: "linear layers", Experts: "stacked expert weights", Module: "attn and mlp", Block: "block",
    Attention: "attn",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Binding:
    """One method at one site. `path` is where the compiled model keeps its state."""

    statement: int
    method: Method
    site: Site
    path: str
    span: Span
    shared_path: str = ""
    shared: dict[str, State] = field(default_factory=dict)

    @cached_property
    def state(self) -> dict[str, State]:
        """The tensors the method keeps here."""
        return self.method.state(self.site)

    @cached_property
    def own_names(self) -> dict[str, str]:
        """The full name of each tensor the method keeps here."""
        return {name: f"{self.path}.{name}" for name in self.state}

    @cached_property
    def names(self) -> dict[str, str]:
        """The full name of each tensor the method has here, those it shares with other sites included."""
        return self.own_names | {name: f"{self.shared_path}.{name}" for name in self.shared}

    @cached_property
    def tensors(self) -> dict[str, State]:
        """Full name -> what `names` names."""
        specs = self.state | self.shared
        return {full: specs[name] for name, full in self.names.items()}


@dataclass(frozen=True)
class Row:
    """One line of the report: a statement, what it matched, what it costs."""

    statement: str
    sites: int
    parameters: int
    stored: int | None = None  # bytes that the packed weights take, of a statement that packs some
    dense: int = 0  # and what they take in the base model

    def to_json(self) -> dict[str, Any]:
        """The row as plain data."""
        row = {"statement": self.statement, "sites": self.sites, "parameters": self.parameters}
        return row if self.stored is None else row | {"bytes": self.stored, "dense_bytes": self.dense}


@dataclass(frozen=True)
class Plan:
    """What a spec comes to on a model. Counts are exact; nothing has been allocated."""

    spec: ast.Spec
    captured: Captured
    sites: Sites
    bindings: tuple[Binding, ...]
    trained: dict[str, Span]
    rows: tuple[Row, ...]
    stored: dict[str, Stored] = field(default_factory=dict)
    checkpoints: dict[str, Span] = field(default_factory=dict)

    @property
    def trainable(self) -> int:
        """Parameters that learn: the methods' own and the existing ones a `train` statement names."""
        return self._added(trainable=True) + sum(self.sites.parameters[name] for name in self.trained)

    @property
    def total(self) -> int:
        """All parameters of the compiled model, the frozen ones included."""
        return sum(self.sites.parameters.values()) + self._added(trainable=True) + self._added(trainable=False)

    @property
    def share(self) -> float:
        """`trainable` over `total`."""
        return self.trainable / self.total if self.total else 0.0

    def _added(self, *, trainable: bool) -> int:
        return sum(prod(state.shape) for state in self.tensors.values() if state.trainable is trainable)

    @cached_property
    def tensors(self) -> dict[str, State]:
        """Every tensor that the methods keep, by its full name; one that sites share is there once."""
        return {name: state for binding in self.bindings for name, state in binding.tensors.items()}

    @cached_property
    def consistency(self) -> float:
        """The weight of a consistency loss between two passes of each step; 0 where no method asks for one."""
        has_loss = list(getattr(self.captured.result, "context", None) or [])[:1] == ["loss"]
        return max((binding.method.consistency for binding in self.bindings), default=0.0) if has_loss else 0.0

    @cached_property
    def kept(self) -> tuple[Kept, ...]:
        """What autograd keeps, read off the captured graph; building the module, which rewrites it, asks first."""
        return kept_for_backward(self)

    @cached_property
    def input_values(self) -> tuple[torch.Tensor, ...]:
        """The fake values of the graph's inputs."""
        return tuple(node.meta["val"] for node in self.captured.module.graph.find_nodes(op="placeholder"))

    def memory(self, batch: int = 1, seq: int = 512, optimizer: str = "adamw") -> Memory:
        """Bytes of one training step by kind: weights, gradients, optimiser state, activations."""
        return estimate(self, batch, seq, optimizer)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "model": self.sites.model,
            "trainable": self.trainable,
            "total": self.total,
            "share": self.share,
            "statements": [row.to_json() for row in self.rows],
            "bindings": [
                {"method": repr(binding.method), "site": binding.site.name, "path": binding.path}
                for binding in self.bindings
            ],
            "trained": list(self.trained),
            "checkpoints": list(self.checkpoints),
            "stored": [
                {"weight": item.weight, "storage": repr(item.storage), "path": item.path, "bytes": item.bytes}
                for item in self.stored.values()
            ],
        }


def make_plan(captured: Captured, sites: Sites, spec: ast.Spec) -> Plan:
    """Matches `spec` against `sites`.

    Raises:
        PeftcError: with all semantic errors, those that need no model and those that do.
    """
    return _Planner(captured, sites, spec).plan()


class _Planner:
    def __init__(self, captured: Captured, sites: Sites, spec: ast.Spec) -> None:
        self.spec = spec
        self.captured = captured
        self.sites = sites
        self.intentions = resolve(spec)
        self.problems: list[Diagnostic] = []
        self.rows: list[Row] = []

    def plan(self) -> Plan:
        bindings = [
            binding
            for index, application in enumerate(self.intentions.applications)
            for binding in self._bind(index, application)
        ]
        self._twice(bindings)
        trained = self._trained()
        stored = self._stored(trained)
        self._claims(bindings, trained)
        self.problems += too_long(bindings)
        self.problems += never_learning(self.captured.module.graph, bindings, trained)
        self.problems += self._cannot_agree(bindings)
        if not bindings and not trained and not self.problems:
            self.problems.append(say.NothingTrains())
        ordered = sorted(_knowing(stored, bindings), key=lambda binding: binding.method.stage)
        checkpoints = recomputed(self.intentions.recomputings, self._select, self.problems)
        self.rows += [
            Row(_one_line(item.span), sum(span == item.span for span in checkpoints.values()), 0)
            for item in self.intentions.recomputings
        ]
        plan = Plan(
            self.spec, self.captured, self.sites, tuple(ordered), trained, tuple(self.rows), stored, checkpoints
        )
        if not self.problems:
            self.problems += [problem for budget in self.intentions.budgets if (problem := over(plan, budget))]
        if self.problems:
            raise PeftcError(*in_file_order(self.problems))
        return plan

    def _select(self, selector: ast.Selector, *, parameters: bool = False) -> list[Site]:
        selection = Selection(self.sites, parameters=parameters)
        found = selection(selector)
        self.problems += selection.problems
        return found

    def _bind(self, index: int, application: Application) -> list[Binding]:
        method = application.method
        found = self._select(application.target) if application.target else self._sequences(application)
        wrong = [site for site in found if not isinstance(site, method.site)]
        if wrong:
            self._wrong_site(application, wrong)
        fitting = linked([site for site in found if isinstance(site, method.site)])
        reasons: dict[str, list[Site]] = defaultdict(list)
        for site in fitting:
            if reason := _mixed(site) or _obstacle(site, method) or method.refuses(site):
                reasons[reason].append(site)
        for reason, refused in reasons.items():
            self.problems.append(
                say.Refused(
                    method=method.name, site=refused[0].name, reason=reason, others=len(refused) - 1,
                    span=application.where,
                )
            )  # fmt: skip
        if wrong or reasons:
            return []
        shared = method.shared(fitting)
        home = self._free(f"{method.label}_{index}" if index else method.label) if shared else ""
        bindings = [
            Binding(index, method, site, self._path(method, site), application.span, home, shared) for site in fitting
        ]
        tensors = {name: state for binding in bindings for name, state in binding.tensors.items()}
        count = sum(prod(state.shape) for state in tensors.values() if state.trainable)
        self.rows.append(Row(_one_line(application.span), len(bindings), count))
        return bindings

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
                wants=choices([KINDS[kind] for kind in kinds(application.method)], "and"),
                site=wrong[0].name,
                site_kind=_kind_of(wrong[0]),
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

    def _twice(self, bindings: list[Binding]) -> None:
        """One error for each pair of statements that put one method on one site."""
        first: dict[tuple[str, str], Binding] = {}
        clashes: dict[tuple[int, int], list[tuple[Binding, Binding]]] = defaultdict(list)
        whole = {
            (b.method.label, b.site.weight): b
            for b in bindings
            if isinstance(b.site, Projection) and b.site.rows is None
        }
        for binding in bindings:
            key = binding.method.label, binding.site.name
            earlier = first.setdefault(key, binding)
            if isinstance(binding.site, Projection) and _is_part(binding.site) and earlier is binding:
                earlier = whole.get((binding.method.label, binding.site.weight), binding)
            if earlier is not binding:
                pair = sorted((earlier, binding), key=lambda b: b.statement)
                clashes[pair[0].statement, pair[1].statement].append((pair[0], pair[1]))
        for pairs in clashes.values():
            earlier, later = pairs[0]
            self.problems.append(
                say.SameMethodTwice(
                    method=later.method.name, site=later.site.name, others=len(pairs) - 1,
                    first=earlier.span, span=later.span,
                )
            )  # fmt: skip

    def _claims(self, bindings: list[Binding], trained: dict[str, Span]) -> None:
        """A method that needs the weight to itself shares it neither with another nor with `train`."""
        by_weight: dict[str, list[Binding]] = defaultdict(list)
        for binding in bindings:
            if isinstance(binding.site, Projection) and binding.method.stage is Stage.WEIGHT:
                by_weight[binding.site.weight].append(binding)
        seen: set[tuple[Span, Span]] = set()
        for weight, sharing in by_weight.items():
            for one in sharing:
                others = [other.span for other in sharing if other.span != one.span and _overlap(one, other)]
                others += [trained[weight]] if weight in trained else []
                reason = one.method.claims_weight()
                if reason and others and (one.span, others[0]) not in seen:
                    seen.add((one.span, others[0]))
                    self.problems.append(
                        say.WeightClaimed(
                            method=one.method.name, site=one.site.name, reason=reason,
                            other=others[0], span=one.span,
                        )
                    )  # fmt: skip

    def _stored(self, trained: dict[str, Span]) -> dict[str, Stored]:
        """What `quantize` packs. Its rows stand first, as the pass does that carries it out."""
        statements = [(storing, self._select(storing.target, parameters=True)) for storing in self.intentions.storings]
        stored, problems = stored_weights(self.captured, statements, trained)
        self.problems += problems
        rows = []
        for number, (storing, _) in enumerate(statements):
            mine = [item for item in stored.values() if item.statement == number]
            packed, dense = (sum(sizes) for sizes in ([i.bytes for i in mine], [i.dense_bytes for i in mine]))
            rows.append(Row(_one_line(storing.span), len(mine), 0, packed, dense))
        self.rows[:0] = rows
        return stored

    def _cannot_agree(self, bindings: list[Binding]) -> list[Diagnostic]:
        """Two passes can only be compared by logits."""
        convention = Convention(self.captured.inputs, self.captured.result)
        wanting = [binding for binding in bindings if binding.method.consistency]
        if not wanting or convention.keys[:1] != ["loss"] or convention.logits:
            return []
        first = wanting[0]
        reason = "the model returns no logits to compare its two passes by: give consistency=0"
        others = len(wanting) - 1
        return [
            say.Refused(method=first.method.name, site=first.site.name, reason=reason, others=others, span=first.span)
        ]

    def _trained(self) -> dict[str, Span]:
        """Existing parameters that learn, after every `train` and `freeze` in file order."""
        trained: dict[str, Span] = {}
        named: set[str] = set()
        for training in self.intentions.trainings:
            found = self._select(training.target, parameters=True)
            self._refuse_slices(found, training, trained)
            parameters = dict.fromkeys(name for site in found if not _is_part(site) for name in site.parameters)
            if not training.on:
                trained = {name: span for name, span in trained.items() if name not in parameters}
                continue
            named |= {site.name for site in found}
            trained |= dict.fromkeys(parameters, training.span)
            count = sum(self.sites.parameters[name] for name in parameters)
            self.rows.append(Row(_one_line(training.span), len(found), count))
        self._refuse_tied(trained, named)
        return trained

    def _refuse_slices(self, found: list[Site], training: Training, trained: dict[str, Span]) -> None:
        """A part of a weight cannot learn by itself, nor be frozen out of a weight that learns."""
        for site in found:
            if isinstance(site, Projection) and _is_part(site) and (training.on or site.weight in trained):
                self.problems.append(say.TrainsASlice(site=site.name, weight=site.weight, span=training.target.span))
                return

    def _refuse_tied(self, trained: dict[str, Span], named: set[str]) -> None:
        """A tied tensor trains only when all of its readers were named."""
        for name, span in trained.items():
            readers = [
                site for site in self.sites
                if name in site.parameters and ("embed" in site.roles or getattr(site, "tied", False))
            ]  # fmt: skip
            missing = tuple(site.name for site in readers if site.name not in named)
            trains = tuple(site.name for site in readers if site.name in named)
            if missing and trains:
                self.problems.append(say.TrainsTied(trains=trains, missing=missing, span=span))


def _knowing(stored: dict[str, Stored], bindings: list[Binding]) -> list[Binding]:
    """The bindings, with the storage of the weight told to each that takes something out of it."""
    return [
        replace(binding, site=replace(binding.site, storage=stored[binding.site.weight].storage))
        if isinstance(binding.site, Projection) and binding.method.prepares and binding.site.weight in stored
        else binding
        for binding in bindings
    ]


def over(plan: Plan, budget: Budget) -> Diagnostic | None:
    """The error of a budget that `plan` does not keep, or None."""
    limit = budget.limit.scaled
    if budget.quantity == "memory":
        memory = plan.memory(budget.arguments.get("batch", 1), budget.arguments.get("seq", 512))
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


def _mixed(site: Site) -> str | None:
    if isinstance(site, Projection) and site.mixed:
        return "its weight is applied in two ways (transposed, or with another bias), which one change cannot serve"
    return None


def _obstacle(site: Site, method: Method) -> str | None:
    """Why no method at all fits into a sequence or an attention."""
    if isinstance(site, Sequence):
        return site.obstacle
    return site.obstacle if isinstance(site, Attention) and method.stage is Stage.ATTENTION else None


def _is_part(site: Site) -> bool:
    return isinstance(site, Projection) and site.rows is not None


def _overlap(one: Binding, other: Binding) -> bool:
    """Whether two bindings stand on common rows of a weight."""
    assert isinstance(one.site, Projection)
    assert isinstance(other.site, Projection)
    if one.site.rows is None or other.site.rows is None:
        return True
    return not set(one.site.rows).isdisjoint(other.site.rows)


def _kind_of(site: Site) -> str:
    words = {
        "parameters": "an existing parameter",
        "module": "a sublayer",
        "attention": "a sublayer",
        "block": "a block",
        "experts": "a stack of experts",
    }
    return words.get(site.kind, f"a {site.kind} layer")


def _one_line(span: Span) -> str:
    return " ".join(span.source.text[span.start : span.end].split())
