"""Low-rank branches of several tasks, of which each row of the batch has its own task's: rows of one task together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx

from peftc.graph.ir import computed, drop_unread, value
from peftc.kernels.rows_of_batch import together
from peftc.optimise.decoding.packed import Weight, times

aten = torch.ops.aten
LINEAR, ROW_SCALES = aten.linear.default, torch.ops.peftc.row_scales.default


class Groups(NamedTuple):
    """The rows of a batch by task, as many places for each as the most have; the last tasks, of no row, left out.

    Where they lie so that they can be read in place, `steps` says how far apart: from one task's first to the next
    one's, and from place to place. Else rows [tasks * places]: the row in each place, any where there is none; places
    [batch]: where each row is; theirs [batch, 1, 1]: 1, and 0 for a row of no task, None where there is none such.
    """

    tasks: int
    steps: tuple[int, int] | None
    rows: Tensor | None
    places: Tensor | None
    theirs: Tensor | None


def groups(which: Tensor, owners: Sequence[int], dtype: torch.dtype) -> Groups:
    """The rows of each task.

    Args:
        which: the number of each row's task, [batch], int64.
        owners: the number of each branch's task.
        dtype: of what is computed.
    """
    asked = which.tolist()
    rows = [[row for row, task in enumerate(asked) if task == owner] for owner in owners]
    while len(rows) > 1 and not rows[-1]:
        rows.pop()
    most = max(1, *map(len, rows))
    if steps := _steps(rows, len(asked)):
        return Groups(len(rows), steps, None, None, None)
    order = [row for members in rows for row in members + [0] * (most - len(members))]
    places = {row: at * most + place for at, members in enumerate(rows) for place, row in enumerate(members)}
    theirs = [[[float(row in places)]] for row in range(len(asked))]
    return Groups(
        len(rows), None,
        torch.tensor(order, device=which.device),
        torch.tensor([places.get(row, 0) for row in range(len(asked))], device=which.device),
        None if len(places) == len(asked) else torch.tensor(theirs, dtype=dtype, device=which.device),
    )  # fmt: skip


def _steps(rows: list[list[int]], batch: int) -> tuple[int, int] | None:
    """How far apart the rows of all tasks lie, where all have as many and lie alike: one behind another, or in turn."""
    tasks, most = len(rows), len(rows[0])
    if tasks * most != batch:
        return None
    for between, within in ((most, 1), (1, tasks)):
        if rows == [[task * between + place * within for place in range(most)] for task in range(tasks)]:
            return between, within
    return None


def stacked_a(matrices: Sequence[Tensor]) -> Tensor:
    """A_t [r_t, n_in] as [tasks, n_in, r], with zeros where one has fewer rows."""
    if (there := _in_place(matrices)) is not None:
        return there
    made = matrices[0].new_zeros(len(matrices), matrices[0].shape[1], max(a.shape[0] for a in matrices))
    for at, a in enumerate(matrices):
        made[at, :, : a.shape[0]] = a.t()
    return made


def stacked_b(matrices: Sequence[Tensor]) -> Tensor:
    """B_t [n_out, r_t] as [tasks, r, n_out], with zeros where one has fewer columns."""
    if (there := _in_place(matrices)) is not None:
        return there
    made = matrices[0].new_zeros(len(matrices), max(b.shape[1] for b in matrices), matrices[0].shape[0])
    for at, b in enumerate(matrices):
        made[at, : b.shape[1]] = b.t()
    return made


def _in_place(matrices: Sequence[Tensor]) -> Tensor | None:
    """Matrices that lie together, turned, without a copy; the last may be there again and again, for no row."""
    distinct = [*matrices] if type(matrices[0].data) is Tensor else []
    while len(distinct) > 1 and distinct[-1].data_ptr() == distinct[-2].data_ptr():
        distinct.pop()
    found = together(distinct) if distinct else None
    return None if found is None else found.transpose(1, 2)


def products(
    x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, scales: float | Sequence[float],
    by_task: Groups,
) -> Tensor:  # fmt: skip
    """y = W x + bias + scale_t B_t A_t x, t the task of a row.

    Args:
        x: [batch, tokens, n_in].
        weight: W [n_out, n_in].
        bias: [n_out] or None.
        a: as `stacked_a` makes it.
        b: as `stacked_b` makes it.
        scales: a number each, or that of all.
        by_task: the rows of each task.
    """
    batch, tokens, n_in = x.shape
    flat = x.reshape(-1, n_in)
    y = times(flat, weight, bias)
    tasks, steps, rows, places, theirs = by_task
    a, b = a[:tasks], b[:tasks]
    if steps is not None and (tokens == 1 or steps[1] == 1):
        rows, places, x = None, None, _in_groups(flat.contiguous(), tasks, steps, tokens)
    elif steps is not None:
        order = torch.arange(batch, device=x.device).view(-1, tasks)
        rows, places = order.t().flatten(), order.view(tasks, -1).t().flatten()
    thin = torch.bmm(x if rows is None else x.index_select(0, rows).view(tasks, -1, n_in), a)
    alpha = 1.0
    if isinstance(scales, float):
        alpha = scales
    else:
        _scaled(thin, scales[:tasks])
    if places is None:
        assert steps is not None
        _in_groups(y, tasks, steps, tokens).baddbmm_(thin, b, alpha=alpha)
        return y.view(batch, tokens, -1)
    found = torch.bmm(thin, b).view(-1, tokens, y.shape[1]).index_select(0, places)
    y = y.view(batch, tokens, -1)
    return y.add_(found, alpha=alpha) if theirs is None else y.addcmul_(found, theirs, value=alpha)


def _in_groups(flat: Tensor, tasks: int, steps: tuple[int, int], tokens: int) -> Tensor:
    """The rows of a contiguous [batch * tokens, n] by task, in place: [tasks, rows of each, n]."""
    wide, (between, within) = flat.shape[1], steps
    of_each = flat.shape[0] // tasks
    return flat.as_strided((tasks, of_each, wide), (between * tokens * wide, within * wide, 1))


def _scaled(thin: Tensor, scales: Sequence[float]) -> Tensor:
    """[tasks, rows, r], multiplied in place by a scale each."""
    return thin.mul_(torch.tensor(list(scales), dtype=thin.dtype, device=thin.device)[:, None, None])


def fewer_by_row(graph: fx.Graph) -> None:
    """Computes branches whose columns belong to rows of the batch so, where all is of one dtype."""
    known: dict[Any, fx.Node] = {}
    for scaled in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        found = _around(scaled)
        if found is None or len({value(node).dtype for node in (*found.a, *found.b, found.x, found.weight)}) > 1:
            continue
        given: Any = found.scales.args
        which, owners, _, scales = given
        asked = which, tuple(owners), value(found.x).dtype
        if asked not in known:
            with graph.inserting_after(which):
                known[asked] = graph.call_function(groups, asked)
        with graph.inserting_before(found.total):
            a = _made(graph, stacked_a, (found.a,))
            b = _made(graph, stacked_b, (found.b,))
        found.total.target = products
        alpha = scales[0] if len({*scales}) == 1 else scales
        found.total.args = (found.x, found.weight, found.bias, a, b, alpha, known[asked])
    drop_unread(graph)


class _Found(NamedTuple):
    """linear(x, weight, bias) + linear(linear(x, A) * scales, B), and the branches that A and B are of."""

    total: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    a: list[fx.Node]
    b: list[fx.Node]
    scales: fx.Node


def _around(scaled: fx.Node) -> _Found | None:
    """The sum around the product with the scales of rows."""
    thin, spread = _call(scaled.args[0], LINEAR), _call(scaled.args[1], aten.unsqueeze.default)
    scales = _call(spread and spread.args[0], ROW_SCALES)
    wide = _only(scaled, LINEAR)
    total = wide and _only(wide, aten.add.Tensor)
    if thin is None or scales is None or wide is None or total is None or total.kwargs or len(thin.users) > 1:
        return None
    base, a = _call(total.args[0], LINEAR), _call(thin.args[1], aten.cat.default)
    turned = _call(wide.args[1], aten.transpose.int)
    b = _call(turned and turned.args[0], aten.cat.default)
    if base is None or a is None or b is None or len(base.users) > 1 or base.args[0] is not thin.args[0]:
        return None
    x, weight, bias, *_ = (*base.args, None)
    first, second = a.args[0], [part.args[0] for part in b.args[0]]  # type: ignore[union-attr]
    return _Found(*cast(Any, (total, x, weight, bias, first, second, scales))) if value(base).dim() == 3 else None


def _call(node: Any, target: Any) -> fx.Node | None:
    """A node, where it is a call of this kind."""
    return node if isinstance(node, fx.Node) and node.target is target else None


def _only(node: fx.Node, target: Any) -> fx.Node | None:
    """The one node that reads another, where it is of this kind."""
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and readers[0].target is target else None


def _made(graph: fx.Graph, function: Any, given: tuple[Any, ...]) -> fx.Node:
    made = graph.call_function(function, given)
    made.meta["val"] = computed(made)
    return made
