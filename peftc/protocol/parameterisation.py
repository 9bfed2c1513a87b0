"""What a parameterisation is: how a trained matrix is made of fewer numbers, wherever a method has a dense one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from peftc.protocol import Tensor
from peftc.protocol.method import State
from peftc.protocol.params import Configured, param, register

__all__ = ["Parameterisation", "param", "parameterisation"]


class Parameterisation(Configured):
    """Base of every parameterisation of a matrix W [n_out, n_in]. A file under `passes/parameterisations` is one."""

    noun = "parameterisation"
    such_as = "phm(n=4)"
    folder = "parameterisations"

    def refuses(self, n_out: int, n_in: int) -> str | None:
        """Why a matrix of this shape cannot be made so, or None."""
        return None

    def state(self, n_out: int, n_in: int, *, zero: bool) -> dict[str, State]:
        """The tensors of one matrix; `zero`: W starts at zero, else as random as a linear layer's."""
        raise NotImplementedError

    def common(self, shapes: Sequence[tuple[int, int]]) -> dict[str, State]:
        """The tensors that the matrices of a statement have in common, under names that `state` does not use."""
        return {}

    def dense(self, state: Mapping[str, Tensor]) -> Tensor:
        """The definition: W, [n_out, n_in]."""
        raise NotImplementedError

    def apply(self, x: Tensor, bias: Tensor | None, state: Mapping[str, Tensor]) -> Tensor:
        """x Wᵀ + bias, [..., n_in] -> [..., n_out], without forming W where that is cheaper."""
        raise NotImplementedError


P = TypeVar("P", bound=type[Parameterisation])


def parameterisation(cls: P) -> P:
    """Registers a parameterisation under its `name`."""
    return register(cls)
