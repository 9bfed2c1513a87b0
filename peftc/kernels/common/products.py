"""Matrix products by whichever way is soonest on this machine.

In fp32 on the CPU a product can be had of two libraries, and turned: (left right)ᵀ = rightᵀ leftᵀ has the same numbers,
and either library may take half or twice the time for it. Which is soonest differs by maker, by shape and by layout
(for 16 rows oneDNN needs as long as for 8; MKL's product of two rows, turned, is sooner than its product with a vector
on an AMD processor). So each class of products is tried when it is first met, for some milliseconds, and what was found
is kept for the process. The ways differ in the order of their sums alone. Another way than torch's own has to be sooner
time and again, in turn with it: beside a busy neighbour a single trial may be off by half.

All is left to torch's own `mm` where `torch.use_deterministic_algorithms(True)` asks for the same bits in each run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

SMALL = 1 << 16  # numbers of `right`: below, choosing costs what it may win
ROUNDS = 3
BETTER = 0.95  # of the time of the plain way: less is noise
COLD = 1 << 23  # numbers of the matrices that a product of few rows is tried on: more than caches hold
HOPELESS = 1.2  # times as long as the soonest: no further round
# By how many turns more than it loses a way has to win, and how many it may lose more than it wins: one that is no
# sooner wins four turns in ten by chance, and eight more than it loses once in fifty trials.
WON, LOST = 8, 2
FEW, MANY = 32, 256  # rows: up to FEW, reading `right` is what takes time; above MANY, no more changes
WORK = 1 << 28  # multiplications of a product that is tried; a larger one is like it

# Of which a matrix times one row is sooner than of a matrix of one row.
WIDE = (torch.float32, torch.float64)

Way = Callable[[Tensor, Tensor], Tensor]


def _plain(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right)


def _vector(left: Tensor, right: Tensor) -> Tensor:
    return torch.mv(right.t(), left.view(-1)).view(1, -1)


def _turned(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(right.t(), left.t()).t().contiguous()


def _twice(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(right.t(), torch.cat([left, left]).t())[:, 0].contiguous().view(1, -1)


def _onednn(left: Tensor, right: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
    return result


def _turned_onednn(left: Tensor, right: Tensor) -> Tensor:
    return _onednn(right.t(), left.t()).t().contiguous()


def product(
    left: Tensor, right: Tensor, bias: Tensor | None = None, out: Tensor | None = None, *, unpacked: bool = False
) -> Tensor:
    """left @ right + bias: [m, k] and [k, n] in any layout, [n]. No gradient is recorded; `out` is written if given.

    `unpacked`: `right` was written just now, so that it lies in a cache.
    """
    way = way_of(left, right, unpacked)
    if way is not _plain:
        result = way(left, right)
        if bias is not None:
            result.add_(bias)
        return result if out is None else out.copy_(result)
    if bias is None:
        return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
    return torch.addmm(bias, left, right) if out is None else torch.addmm(bias, left, right, out=out)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total += left @ right."""
    return _add_(total, left, right, way_of(left, right, adds=True))


def _add_(total: Tensor, left: Tensor, right: Tensor, way: Way) -> Tensor:
    return total.addmm_(left, right) if way is _plain else total.add_(way(left, right))


def way_of(left: Tensor, right: Tensor, unpacked: bool = False, adds: bool = False) -> Way:
    """How to multiply [m, k] and [k, n]; what it gives is contiguous, [m, n]. `adds`: it is added to a matrix."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):  # which have ways of their own
        return _plain
    if left.dtype not in WIDE or right.dtype is not left.dtype or left.device.type != "cpu":
        return _plain
    (rows, inner), columns = left.shape, right.shape[1]
    right_turned = right.stride(0) == 1
    plain = _vector if rows == 1 and right_turned else _plain
    if inner * columns < SMALL or rows == 0 or left.dtype is not torch.float32:
        return plain
    if torch.are_deterministic_algorithms_enabled() or not left.is_contiguous():
        return plain
    if not (right.t() if right_turned else right).is_contiguous():
        return plain
    threads, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
    return _soonest(_rows(rows), inner, columns, right_turned, unpacked, adds, onednn, threads)


def _rows(rows: int) -> int:
    """The class of a number of rows: 1, 2, 4, 8, …"""
    return min(1 << (rows - 1).bit_length(), MANY)


@cache
def _soonest(
    rows: int, inner: int, columns: int, right_turned: bool, unpacked: bool, adds: bool, onednn: bool, threads: int
) -> Way:
    """The soonest way for a class of products; the plain one unless another is clearly sooner."""
    ways = [_vector, _twice] if rows == 1 and right_turned else [_plain, _turned]
    if unpacked:  # turned, MKL's products gain by how they read memory alone
        ways = ways[:1]
    if onednn and torch.backends.mkldnn.is_available():
        ways += [_onednn, _turned_onednn] if right_turned else [_onednn]
    inner, columns = _smaller(rows, inner, columns)
    copies = 0 if unpacked else max(1, COLD // (inner * columns)) if rows <= FEW else 1
    return _tried(tuple(ways), rows, inner, columns, copies, right_turned, adds, threads)


def _smaller(rows: int, inner: int, columns: int) -> tuple[int, int]:
    """The sizes of a product that takes some milliseconds, and as long in proportion as that of these sizes."""
    while (rows * inner * columns > WORK or inner * columns > COLD // 2) and max(inner, columns) > MANY:
        if inner > columns:
            inner = -(-inner // 2)
        else:
            columns = -(-columns // 2)
    return inner, columns


@cache
def _tried(
    ways: tuple[Way, ...], rows: int, inner: int, columns: int, copies: int, right_turned: bool, adds: bool,
    threads: int,
) -> Way:  # fmt: skip
    """Tries them in turn.

    A product of few rows reads so many matrices that no cache holds them, as a model's are; of 0 it reads one that is
    written before each time.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter  # the first does not see who else is at work
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        left = torch.full((rows, inner), 0.5, device="cpu", dtype=torch.float32)
        shape = (columns, inner) if right_turned else (inner, columns)
        matrices = torch.full((max(copies, 1), *shape), 0.5, device="cpu", dtype=torch.float32)
        rights = [matrix.t() if right_turned else matrix for matrix in matrices]
        total = torch.zeros(rows, columns, device="cpu", dtype=torch.float32) if adds else None

        def seconds(way: Way) -> float:
            if not copies:
                matrices.fill_(0.5)
            start = clock()
            for right in rights:
                if total is None:
                    way(left, right)
                else:
                    _add_(total, left, right, way)
            return clock() - start

        best = dict.fromkeys(ways, float("inf"))
        for _ in range(ROUNDS if copies else 2 * ROUNDS):
            for way in [way for way in ways if best[way] <= HOPELESS * min(best.values())]:
                best[way] = min(best[way], seconds(way))
        plain = ways[0]
        sooner = (way for way in sorted(ways, key=best.__getitem__) if best[way] < BETTER * best[plain])
        return next((way for way in sooner if _wins(way, plain, seconds)), plain)


def _wins(way: Way, plain: Way, seconds: Callable[[Way], float]) -> bool:
    """Whether `way` is sooner than `plain` time and again."""
    lead = 0
    while -LOST < lead < WON:
        lead += 1 if seconds(way) < BETTER * seconds(plain) else -1
    return lead == WON
