"""`fit` statements solved: first the ranks, as what learns is part of the memory, and then the memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from peftc.diagnostics.source import Span
from peftc.planning.fitting.memory import MemoryFit
from peftc.planning.fitting.ranks import fitting_rank
from peftc.planning.plan import Fitted, Plan
from peftc.spec.resolve import Intentions
from peftc.spec.solved import solved


def fitted(wanted: Intentions, plan_of: Callable[[Intentions], Plan]) -> Plan:
    """The plan of a spec whose `fit` statements are met; its own spec has written out what was chosen.

    Args:
        wanted: of a spec with `fit` statements.
        plan_of: plans what a spec without them wants.

    Raises:
        PeftcError: `cannot-fit`, and with all semantic errors of the spec.
    """

    def unlimited(one: Intentions) -> Plan:
        return plan_of(replace(one, budgets=[]))

    fits = {fit.budget.quantity: fit for fit in wanted.fits}
    rank, chosen, found = None, dict[Span, tuple[str, ...]](), list[Fitted]()
    if trainable := fits.get("trainable"):
        rank, one = fitting_rank(wanted, trainable, unlimited)
        found.append(one)
    if memory := fits.get("memory"):
        span = memory.span
        plan = unlimited(solved(wanted, rank, {}))
        one = MemoryFit(plan, memory, lambda lines: unlimited(solved(wanted, rank, {span: lines}))).solve()
        chosen[span] = one.chosen
        found.append(one)
    return replace(plan_of(solved(wanted, rank, chosen)), fitted=tuple(found))
