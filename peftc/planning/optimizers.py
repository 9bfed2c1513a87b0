"""How much state an optimiser keeps, for the memory table."""

from __future__ import annotations

from collections.abc import Callable

# Optimiser -> bytes of state for each parameter of so many bytes.
STATE_BYTES: dict[str, Callable[[int], int]] = {
    "adamw": lambda size: 2 * size,
    "adam": lambda size: 2 * size,
    "sgd": lambda size: 0,
    "momentum": lambda size: size,
    "lion": lambda size: size,
    "adamw8bit": lambda size: 2,
}
