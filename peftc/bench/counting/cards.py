"""What a card can do at best, as its maker says: for an estimate of the time that launches take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from peftc.bench.counting.meter import Launch
from peftc.bench.errors import UnknownCard
from peftc.diagnostics.diagnostic import PeftcError

LAUNCH = 4e-6  # seconds between one kernel and the next that are on no card's data sheet
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Card:
    """Bytes a second of memory; dense products' operations a second in bf16 or fp16, and in fp32."""

    name: str
    bandwidth: float
    half: float
    full: float

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second of products in a precision."""
        return self.half if dtype in HALVES else self.full

    def seconds(self, launches: Mapping[Launch, int], dtype: torch.dtype) -> float:
        """The roofline: each launch takes as long as its bytes or its products need, and LAUNCH.

        Args:
            launches: kinds of launch, and how often each occurs.
            dtype: the precision that all products are taken to be in.
        """
        rate = self.rate(dtype)
        return sum(
            count * (max(launch.bytes / self.bandwidth, launch.flops / rate) + LAUNCH)
            for launch, count in launches.items()
        )


CARDS = {
    card.name: card
    for card in (
        Card("a100", 2.039e12, 312e12, 19.5e12),
        Card("h100", 3.35e12, 989e12, 67e12),
        Card("h200", 4.8e12, 989e12, 67e12),
        Card("b200", 8e12, 2250e12, 80e12),
        Card("l4", 0.3e12, 121e12, 30.3e12),
        Card("l40s", 0.864e12, 362e12, 91.6e12),
        Card("mi300x", 5.3e12, 1307e12, 163.4e12),
    )
}


def card_of(name: str | None, bandwidth: float | None = None, rate: float | None = None) -> Card | None:
    """The card of that name, with other figures where they are given; None where nothing is said.

    Args:
        name: one of CARDS.
        bandwidth: bytes a second.
        rate: operations of products a second, in whatever precision.

    Raises:
        PeftcError: `unknown-card`, also where a bandwidth or a rate alone is given.
    """
    if name is None and bandwidth is None and rate is None:
        return None
    if name is not None and name.lower() not in CARDS:
        raise PeftcError(UnknownCard(name=name, known=tuple(CARDS)))
    if name is None:
        if bandwidth is None or rate is None:
            raise PeftcError(UnknownCard(name="", known=tuple(CARDS)))
        return Card("card", bandwidth, rate, rate)
    card = CARDS[name.lower()]
    if bandwidth is not None:
        card = replace(card, bandwidth=bandwidth)
    return card if rate is None else replace(card, half=rate, full=rate)


def kinds(launches: Mapping[Launch, int]) -> list[tuple[str, int, int, int]]:
    """Name, launches, bytes and operations of each kind, the most launches first."""
    found: dict[str, tuple[int, int, int]] = {}
    for launch, count in launches.items():
        before, moved, flops = found.get(launch.name, (0, 0, 0))
        found[launch.name] = before + count, moved + count * launch.bytes, flops + count * launch.flops
    return sorted(((name, *totals) for name, totals in found.items()), key=lambda row: -row[1])
