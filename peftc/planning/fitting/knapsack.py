"""Which things to take so that they save enough and cost least: a covering knapsack, solved exactly.

Equal things are one kind, of which a number is taken. A list of all sums that no other beats (Nemhauser and Ullmann
1969) stays short where there are few kinds, as in a stack of equal blocks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

MOST = 20_000  # sums that are followed; of more, those that save nearly the same count as one


@dataclass(frozen=True)
class Thing:
    """Bytes that it saves, above 0, and what it costs, in any unit."""

    saves: int
    costs: int


@dataclass(frozen=True)
class _Sum:
    saves: int
    costs: int
    counts: tuple[int, ...] = ()


def cheapest(things: Sequence[Thing], needed: int) -> list[int] | None:
    """The places of those to take, of equal ones the first; None where all together save less than is needed.

    Of several choices that cost the same it is one that takes the fewest.
    """
    kinds: dict[Thing, list[int]] = defaultdict(list)
    for place, thing in enumerate(things):
        kinds[thing].append(place)
    sums = [_Sum(0, 0)]
    for kind, places in kinds.items():
        longer = [
            _Sum(min(one.saves + kind.saves * count, needed), one.costs + kind.costs * count, (*one.counts, count))
            for one in sums
            for count in range(1 + min(len(places), -(-max(needed - one.saves, 0) // kind.saves)))
        ]
        sums = _thinned(_unbeaten(longer), needed)
    best = sums[-1]
    if best.saves < needed:
        return None
    taken = zip(kinds.values(), best.counts, strict=True)
    return sorted(place for places, count in taken for place in places[:count])


def _unbeaten(sums: list[_Sum]) -> list[_Sum]:
    """Those that save more than all that cost as little, from the one that saves least on."""
    kept: list[_Sum] = []
    for one in sorted(sums, key=lambda one: (one.costs, -one.saves, sum(one.counts))):
        if not kept or one.saves > kept[-1].saves:
            kept.append(one)
    return kept


def _thinned(sums: list[_Sum], needed: int) -> list[_Sum]:
    """At most about `MOST` of them, spread over what they save; the last one, which saves most, among them."""
    if len(sums) <= MOST:
        return sums
    saved = [one.saves for one in sums]
    places = {bisect_right(saved, needed * step // MOST) - 1 for step in range(MOST + 1)}
    return [sums[place] for place in sorted(places | {len(sums) - 1})]
