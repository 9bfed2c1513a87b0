"""Functions with a derivative of their own, which a trace does not have: it has what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from peftc.capture.trials import alone, numbers_like, seeded
from peftc.graph.rows import hint


class OwnDerivativeError(Exception):
    """A function whose derivative is another than that of what it computes, which alone is in a trace."""


@contextmanager
def derivatives_tried() -> Iterator[None]:
    """While it is open, a trace that comes to a `torch.autograd.Function` with a derivative of its own ends there.

    A graph has what such a function computes, and the derivative of that; where a trial finds both equal, it goes on.

    Raises:
        OwnDerivativeError: from inside what is traced.
    """
    before = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *args: Any) -> Any:
        ours = cls.__module__.partition(".")[0] in ("torch", "peftc")
        if not ours and any(isinstance(one, FakeTensor) for one in args) and not _is_its_derivative(cls, args):
            raise OwnDerivativeError(f"{cls.__name__} has a derivative of its own")
        return before.__get__(None, cls)(*args)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = before  # type: ignore[method-assign]


def _is_its_derivative(cls: Any, args: Sequence[Any]) -> bool:
    """Whether what a function says of its gradients is what autograd makes of its forward, on some numbers."""
    try:
        with alone():
            seeded(0)
            given = [_number_like(one) for one in args]
            learning = [one for one in given if isinstance(one, Tensor) and one.is_floating_point()]
            said, found = (_gradients(run, given, learning) for run in (cls.apply, _forward_of(cls)))
    except Exception:  # it may do anything, and goes by what it is not given here
        return False
    return all(torch.allclose(one, other, rtol=1e-3, atol=1e-5) for one, other in zip(said, found, strict=True))


def _number_like(one: Any) -> Any:
    if isinstance(one, Tensor):
        return numbers_like(one, [hint(size) for size in one.shape], 1, torch.device("cpu"))
    return hint(one)


def _forward_of(cls: Any) -> Callable[..., Any]:
    separate = cls.setup_context is not torch.autograd.Function.setup_context
    return cls.forward if separate else partial(cls.forward, MagicMock())


def _gradients(run: Callable[..., Any], given: Sequence[Any], learning: Sequence[Tensor]) -> list[Tensor]:
    """Of a sum of what `run` returns, each number with a weight of its own, with respect to `learning`."""
    with torch.enable_grad():
        leaves = {id(one): one.detach().clone().requires_grad_() for one in learning}
        made = run(*(leaves.get(id(one), one) for one in given))
        floats = [one for one in pytree.tree_leaves(made) if isinstance(one, Tensor) and one.requires_grad]
        weights = [torch.linspace(0.5, 1.5, one.numel()).reshape(one.shape).to(one.dtype) for one in floats]
        found = torch.autograd.grad(floats, [*leaves.values()], weights, allow_unused=True) if floats else ()
    return [torch.zeros_like(one) if own is None else own for one, own in zip_longest(learning, found)]
