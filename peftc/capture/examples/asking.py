"""A model is asked whether it takes some inputs, and what it makes of them: without numbers where that tells."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from peftc.capture.blocks.once import running_once
from peftc.capture.examples.known import known

# A forward that looks at numbers, where there are none.
UNTOLD = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


def fake_mode_of(model: nn.Module) -> FakeTensorMode | None:
    """The mode of the fake tensors that `model` is made of, or None if it is made of others."""
    mode: FakeTensorMode | None = detect_fake_mode([*model.parameters(), *model.buffers()])
    return mode


def without_numbers(model: nn.Module, given: Mapping[str, torch.Tensor], more: Mapping[str, Any] | None = None) -> Any:
    """What `model` makes of tensors that have no numbers, as its own have none then; of `more` as it is."""
    fake = fake_mode_of(model) or FakeTensorMode(allow_non_fake_inputs=True)  # a forward may have kept real tensors
    with fake, unlogged():
        tensors = (*model.named_parameters(), *model.named_buffers())
        state: dict[str, torch.Tensor] = {name: _faked(tensor, fake) for name, tensor in tensors}
        inputs = {name: _faked(tensor, fake) for name, tensor in given.items()}
        with known(more or {}):
            return torch.func.functional_call(model, state, kwargs={**inputs, **(more or {})})


def answer(
    model: nn.Module, given: Mapping[str, torch.Tensor], more: Mapping[str, Any], *, likely: bool = False
) -> Any:
    """What `model` makes of inputs, with its numbers only where it will not answer without; None where it has none.

    Args:
        model: in whatever mode; it is put in evaluation mode.
        given: the inputs.
        more: what is passed besides, with its numbers.
        likely: that it fails without numbers does not mean that it does with them.

    Raises:
        Exception: what its forward raises, where it does not take them.
    """
    model.eval()
    with torch.no_grad(), torch.random.fork_rng():
        try:
            with running_once(model):
                return without_numbers(model, given, more)
        except Exception as error:
            if not likely and not isinstance(error, UNTOLD):
                raise
            if any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in model.parameters()):
                return None
            return model(**given, **more)


class Method(nn.Module):
    """A method of a module, as a module whose forward it is."""

    def __init__(self, owner: nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.owner = owner
        self.method = method

    def forward(self, **given: Any) -> Any:
        """What the method returns."""
        return self.method(**given)


@contextmanager
def unlogged() -> Iterator[None]:
    """Without what others log of a trace that fails: what goes wrong is told once, by who asked for it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _faked(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor, static_shapes=True)
