"""What several tasks do at one place, to the rows of a batch that are theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout

from peftc.graph.ir import expression
from peftc.kernels.rows_of_batch import row_scales
from peftc.protocol.method import PLAIN, Here, LowRank, Method, State
from peftc.protocol.stages import OPERANDS

WHICH = "which"  # the number of the task of each row, [batch], int64; -1 for none


@dataclass(frozen=True)
class Member:
    """One task's method at a place. `number`: the task's. `names`: what it calls its state -> what the place does."""

    number: int
    method: Method
    names: Mapping[str, str]

    def own(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Its state by its own names."""
        return {name: state[full] for name, full in self.names.items()}


class ByRow(Method):
    """A method for each task, each for the rows that are the task's.

    Low-rank branches are one, whose columns are those of all tasks: a row has its own task's. All of them together are
    few beside a weight, and no row's matrices are gathered. Other methods compute all rows.
    """

    name = "by_row"
    formula = "y_i = f_t(i)(x_i)"

    def __init__(self, members: Sequence[Member], specs: dict[str, State]) -> None:
        super().__init__()
        first = members[0].method
        self.members, self.specs = tuple(members), specs
        self.site, self.stage = first.site, first.stage

    def __repr__(self) -> str:
        return f"by_row({', '.join(f'{member.number}: {member.method!r}' for member in self.members)})"

    def state(self, site: Any) -> dict[str, State]:
        return self.specs

    def rewrites_input(self, site: Any) -> bool:
        return self.members[0].method.rewrites_input(site)

    def asks(self, state: Iterable[str]) -> tuple[str, ...]:
        asked = {name for member in self.members for name in member.method.asks(())}
        return (*state, WHICH, *(name for name in OPERANDS if name in asked))

    def asks_input(self, state: Iterable[str]) -> tuple[str, ...]:
        asked = {name for member in self.members for name in member.method.asks_input(())}
        return (*state, WHICH, *(name for name in OPERANDS if name in asked))

    def rewrite(self, site: Any, x: Tensor, y: Tensor, which: Tensor, **known: Any) -> Tensor:
        """The rows of x and y [rows * n, ..., features] stand in the order of the batch."""
        x, y, whole = _by_row(x, which), _by_row(y, which), y
        found = [(member, member.method.low_rank(site, member.own(known))) for member in self.members]
        thin = [(member, branch) for member, branch in found if branch is not None]
        for p in dict.fromkeys(branch.dropout for _, branch in thin):
            alike = [(member.number, branch) for member, branch in thin if branch.dropout == p]
            y = y + _together(x, which, alike, p, known.get("here", PLAIN)).to(y.dtype)
        for member, branch in found:
            if branch is None:
                changed = member.method.rewrite(site, x, y, **self._chosen(member, member.method.asks, known))
                y = torch.where((which == member.number)[:, None, None], changed, y)
        return _as_before(y, whole)

    def rewrite_input(self, site: Any, x: Tensor, which: Tensor, **known: Any) -> Tensor:
        x, whole = _by_row(x, which), x
        for member in self.members:
            changed = member.method.rewrite_input(site, x, **self._chosen(member, member.method.asks_input, known))
            x = torch.where((which == member.number)[:, None, None], changed, x)
        return _as_before(x, whole)

    @staticmethod
    def _chosen(member: Member, asks: Any, known: Mapping[str, Any]) -> dict[str, Any]:
        own = member.own(known)
        return {name: own[name] if name in own else known.get(name) for name in asks(tuple(own))}


def _by_row(value: Tensor, which: Tensor) -> Tensor:
    """[rows, n, features]"""
    if value.dim() == 3 and expression(value.shape[0]) == expression(which.shape[0]):
        return value
    return value.reshape(which.shape[0], -1, value.shape[-1])


def _as_before(value: Tensor, whole: Tensor) -> Tensor:
    """In the shape of `whole`, which `_by_row` was asked for."""
    return value if [*map(expression, value.shape)] == [*map(expression, whole.shape)] else value.reshape(whole.shape)


def _together(x: Tensor, which: Tensor, found: list[tuple[int, LowRank]], p: float, here: Here) -> Tensor:
    """B (m * A x): m has a task's scale in its own columns for its own rows, and 0 elsewhere."""
    a = torch.cat([branch.a for _, branch in found], -2)
    b = torch.cat([branch.b.transpose(-1, -2) for _, branch in found], -2).transpose(-1, -2)  # read column by column
    owners, scales = [number for number, _ in found], [branch.scale for _, branch in found]
    mask = row_scales(which, owners, [branch.a.shape[-2] for _, branch in found], scales)
    x = dropout(x.to(a.dtype), p) if p else x.to(a.dtype)
    return here.product(here.product(x, a) * mask[:, None].to(a.dtype), b)
