"""`require` and `fit`: limits that are held against a plan, and limits that a plan is made to keep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from peftc import language as ast
from peftc.diagnostics.diagnostic import Diagnostic
from peftc.diagnostics.source import Span
from peftc.protocol.storage import Storage, storages
from peftc.spec import budget_errors as say
from peftc.spec.calls import Calls
from peftc.spec.errors import BadValue, UnknownParameter

QUANTITIES: dict[str, tuple[str, ...]] = {"trainable": (), "total": (), "memory": ("batch", "seq")}
FITTED = ("trainable", "memory")
CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Budget:
    """`require QUANTITY OP VALUE`; `arguments` are memory's batch and sequence."""

    quantity: str
    arguments: dict[str, int]
    op: str
    limit: ast.Number
    span: Span


@dataclass(frozen=True)
class Fit:
    """`fit QUANTITY OP VALUE using …`: the limit, and how memory may be saved.

    `checkpoint`: blocks may be computed again. `storages`: how frozen weights may be packed, the one to try first
    first, each as the spec writes it. `using`: where that is said, if it is.
    """

    budget: Budget
    checkpoint: bool
    storages: tuple[ast.Call, ...]
    using: Span | None

    @property
    def span(self) -> Span:
        """The whole statement."""
        return self.budget.span


def budget(statement: ast.Require, problems: list[Diagnostic]) -> Iterator[Budget]:
    """What a `require` asks for; nothing, and problems, of a quantity that there is not."""
    return _budget(statement, tuple(QUANTITIES), problems)


def fitting(statement: ast.Fit, calls: Calls) -> Iterator[Fit]:
    """What a `fit` asks for; nothing, and problems, of a quantity that nothing can be chosen for."""
    tools: dict[str, ast.Call] = {}
    for tool in statement.using:
        name = tool.name.text
        if name in tools:
            calls.problems.append(say.UsesTwice(name=name, first=tools[name].span, span=tool.span))
        elif name in storages():
            calls.build(tool, Storage)
        elif name != CHECKPOINT:
            known = (CHECKPOINT, *storages())
            calls.problems.append(say.UnknownTool(name=name, known=known, span=tool.span))
        tools.setdefault(name, tool)
    for found in _budget(statement, FITTED, calls.problems):
        using = statement.using[0].span.to(statement.using[-1].span) if statement.using else None
        packing = tuple(tool for name, tool in tools.items() if name != CHECKPOINT)
        yield Fit(found, CHECKPOINT in tools or using is None, packing, using)


def misfits(fits: Sequence[Fit], automatic: Iterable[Span]) -> Iterator[Diagnostic]:
    """What is wrong with the `fit` statements of a spec together; `automatic`: where a rank is `auto`."""
    first: dict[str, Fit] = {}
    for fit in fits:
        quantity = fit.budget.quantity
        if (earlier := first.setdefault(quantity, fit)) is not fit:
            yield say.FitsTwice(quantity=quantity, first=earlier.span, span=fit.span)
        if quantity != "memory" and fit.using is not None:
            yield say.UsesForRanks(quantity=quantity, span=fit.using)
    spans = list(automatic)
    if "trainable" not in first and spans:
        yield say.AutoWithoutFit(span=spans[0])
    if "trainable" in first and not spans:
        yield say.FitsNothing(span=first["trainable"].span)


def _budget(statement: ast.Require | ast.Fit, known: tuple[str, ...], problems: list[Diagnostic]) -> Iterator[Budget]:
    call, limit = statement.quantity, statement.value
    quantity = call.name.text
    if quantity not in known:
        fitted = isinstance(statement, ast.Fit)
        problems.append(say.UnknownQuantity(name=quantity, known=known, fitted=fitted, span=call.name.span))
        return
    arguments = dict(_arguments(call, problems))
    is_bytes = bool(limit.unit and limit.unit.upper().endswith("B") and limit.unit != "B")
    if (quantity == "memory") != is_bytes and not (limit.unit is None and limit.value == 0):
        expects = "an amount of memory, such as 24 GiB" if quantity == "memory" else "a count or a percentage"
        problems.append(say.WrongUnit(quantity=quantity, expects=expects, span=limit.span))
    elif bound := _always(statement.op, limit):
        problems.append(say.EmptyBudget(quantity=quantity, bound=bound, span=statement.span))
    yield Budget(quantity, arguments, statement.op, limit, statement.span)


def _arguments(call: ast.Call, problems: list[Diagnostic]) -> Iterator[tuple[str, int]]:
    takes = QUANTITIES[call.name.text]
    for argument in call.args:
        if argument.name is None or argument.name.text not in takes:
            given = argument.name.text if argument.name else ""
            span = argument.name.span if argument.name else argument.span
            problems.append(UnknownParameter(method=call.name.text, name=given, takes=takes, names=takes, span=span))
        elif not isinstance(argument.value, ast.Number) or not isinstance(argument.value.scaled, int) or (
            argument.value.scaled < 1
        ):  # fmt: skip
            problem = "expects a whole number, at least 1"
            problems.append(
                BadValue(method=call.name.text, name=argument.name.text, problem=problem, span=argument.value.span)
            )
        else:
            yield argument.name.text, argument.value.scaled


def _always(op: str, limit: ast.Number) -> str | None:
    """Why every model keeps such a limit, or none does."""
    if limit.scaled < 0 or (limit.scaled == 0 and op in ("<", ">=")):
        return "nothing is below 0"
    if limit.unit == "%" and (limit.scaled > 1 or (limit.scaled == 1 and op in ("<=", ">"))):
        return "nothing is above 100%"
    return None
