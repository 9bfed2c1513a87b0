"""How many bytes a training step needs, from counts and shapes: weights, gradients, optimiser state, activations.

Nothing here waits for torch: the command line offers the optimisers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

# Optimiser -> bytes of state for each parameter of so many bytes.
STATE_BYTES: dict[str, Callable[[int], int]] = {
    "adamw": lambda size: 2 * size,
    "adam": lambda size: 2 * size,
    "sgd": lambda size: 0,
    "momentum": lambda size: size,
    "lion": lambda size: size,
    "adamw8bit": lambda size: 2,
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def lines(self) -> tuple[str, ...]:
        """One line a kind."""
        return tuple(f"{name:<12}{formatted_bytes(size):>12}" for name, size in self.to_json().items())

    def to_json(self) -> dict[str, int]:
        """Bytes by kind."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
        }


@dataclass(frozen=True, slots=True)
class Kept:
    """Something autograd keeps: a shape, symbolic where it was captured so, and bytes an element."""

    shape: tuple[Any, ...]
    size: int

    def bytes(self, known: Mapping[Any, int]) -> int:
        """Its bytes with the symbols' values put in."""
        return self.size * prod(sized(size, known) for size in self.shape)


def sized(size: Any, known: Mapping[Any, int]) -> int:
    """A size of a captured shape with the symbols' values put in."""
    return size if isinstance(size, int) else int(size.node.expr.subs(known))


def step_memory(weights: int, learning: Iterable[tuple[int, int]], activations: int, optimizer: str) -> Memory:
    """Bytes of one training step.

    Args:
        weights: bytes of the base model's weights as they lie, and of all tensors that methods keep.
        learning: count and bytes an element of each tensor that learns.
        activations: bytes that autograd keeps for the backward pass.
        optimizer: a key of `STATE_BYTES`; its state is in the parameters' own precision.

    Raises:
        ValueError: for an optimizer of another name.
    """
    if optimizer not in STATE_BYTES:
        raise ValueError(f"no optimizer {optimizer!r}; there are {', '.join(STATE_BYTES)}")
    learns = list(learning)
    return Memory(
        weights=weights,
        gradients=sum(count * size for count, size in learns),
        optimizer=sum(count * STATE_BYTES[optimizer](size) for count, size in learns),
        activations=activations,
    )


def formatted_bytes(size: float) -> str:
    """Decimal units, two digits: 2.63 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
