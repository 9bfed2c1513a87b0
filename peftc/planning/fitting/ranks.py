"""`fit trainable <= 0.5%`: the largest rank with which what learns keeps to it, one for all that are `auto`."""

from __future__ import annotations

from collections.abc import Callable

from peftc import language as ast
from peftc.diagnostics.diagnostic import Diagnostic, PeftcError
from peftc.planning.errors import CannotFit
from peftc.planning.plan import Fitted, Plan
from peftc.planning.select import COMPARE
from peftc.protocol.site import Projection
from peftc.spec.budgets import Fit
from peftc.spec.resolve import Intentions
from peftc.spec.solved import solved

SMALLEST = (1, 2, 4, 8, 16)  # of which some methods take only the later ones


def fitting_rank(wanted: Intentions, fit: Fit, plan_of: Callable[[Intentions], Plan]) -> tuple[int, Fitted]:
    """The rank, and what it comes to.

    Args:
        wanted: of the spec, with ranks that are `auto`.
        fit: the limit.
        plan_of: plans what a spec without limits wants.

    Raises:
        PeftcError: `cannot-fit`; what is wrong with every one of the smallest ranks.
    """
    tried: dict[int, Plan | PeftcError] = {}

    def plan(rank: int) -> Plan | PeftcError:
        if rank not in tried:
            try:
                tried[rank] = plan_of(solved(wanted, rank, {}))
            except PeftcError as error:
                tried[rank] = error
        return tried[rank]

    def fits(rank: int) -> bool:
        found = plan(rank)
        return isinstance(found, Plan) and COMPARE[fit.budget.op](_measured(found, fit), fit.budget.limit.scaled)

    low = next((rank for rank in SMALLEST if isinstance(plan(rank), Plan)), None)
    if low is None:
        error = plan(SMALLEST[-2])
        assert isinstance(error, PeftcError)
        raise error
    least = plan(low)
    assert isinstance(least, Plan)
    if not fits(low):
        raise PeftcError(_impossible(least, fit, low))
    high = _widest(least) + 1
    while high - low > 1:
        middle = min((low + high) // 2, 2 * low)  # large ranks are few, and take longer to plan
        low, high = (middle, high) if fits(middle) else (low, middle)
    found = plan(low)
    assert isinstance(found, Plan)
    comes_to = f"r={low}, {found.trainable:,} parameters, {found.share:.4%}"
    return low, Fitted(_one_line(fit.span.text), fit.span, (f"r={low}",), comes_to, "")


def _measured(plan: Plan, fit: Fit) -> float:
    return plan.trainable / plan.total if fit.budget.limit.unit == "%" else plan.trainable


def _widest(plan: Plan) -> int:
    """A rank that adds nothing any more, as it is no site's."""
    sites = [binding.site for binding in plan.bindings]
    return max((min(s.n_in, s.n_out) for s in sites if isinstance(s, Projection)), default=4096)


def _impossible(plan: Plan, fit: Fit, rank: int) -> Diagnostic:
    percent = fit.budget.limit.unit == "%"
    least = f"{plan.share:.4%} ({plan.trainable:,})" if percent else f"{plan.trainable:,}"
    smallest = f"{-(-plan.trainable * 10**6 // plan.total) / 10**4:.4f}%" if percent else f"{plan.trainable}"
    return CannotFit(
        quantity="trainable", least=least, tried=f"with r={rank}", op=fit.budget.op,
        limit=ast.unparse(fit.budget.limit), smallest=f"fit trainable <= {smallest}",
        breakdown=tuple(f"{row.parameters:>13,}  {row.statement}" for row in plan.rows), span=fit.span,
    )  # fmt: skip


def _one_line(text: str) -> str:
    return " ".join(text.split())
