"""Whether a model in parts computes what the whole one does, tried on numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from peftc.diagnostics.diagnostic import PeftcError
from peftc.distributed.errors import NotOnParts
from peftc.driver.compiled import CompiledModule
from peftc.graph.ir import get_attribute

# Sums over processes are made in another order: some hundred times the rounding of one number.
ROUNDINGS = 500.0
SEED = 1


def compare(whole: CompiledModule, part: CompiledModule, mine: Callable[[str, Tensor], Tensor]) -> None:
    """Runs both on the example that they were captured with, forward and backward, where all that learns is random.

    Args:
        whole: the model on one process.
        part: this process's.
        mine: the part of a tensor of `whole`, by name.

    Raises:
        PeftcError: `not-on-parts` with the first result or gradient that differs.
    """
    random = torch.Generator().manual_seed(SEED)
    drawn = {
        name: torch.randn(tensor.shape, generator=random).to(tensor).mul_(0.1).add_(tensor.detach())
        for name, tensor in whole.trainable_parameters().items()
    }
    expected = _step(whole, drawn)
    found = _step(part, {name: mine(name, tensor) for name, tensor in drawn.items()})
    for name, tensor in expected.items():
        wanted = tensor if name == "" else mine(name, tensor)
        largest = ROUNDINGS * torch.finfo(whole.dtype).eps * float(tensor.abs().max())
        if not (found[name] - wanted).abs().max() <= largest:
            what = whole.plan.sites.model if name == "" else _method(whole, name)
            reason = "it computes something else in parts" if name == "" else f"{name} has other gradients in parts"
            raise PeftcError(NotOnParts(what=what, reason=reason))


def _method(compiled: CompiledModule, name: str) -> str:
    return next((b.method.name for b in compiled.plan.bindings if name in b.names.values()), name)


def _step(compiled: CompiledModule, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first result, by the name '', and the gradients of its sum, or of the loss, by name."""
    example = compiled.plan.captured.example
    with _as_it_was(compiled, state):
        given = {name: tensor.to(compiled.device) for name, tensor in example.kwargs.items()}
        returned = compiled(*(tensor.to(compiled.device) for tensor in example.args), **given)
        result = pytree.tree_leaves(returned)
        learning = compiled.trainable_parameters()
        first = result[0].float()
        gradients = torch.autograd.grad(first.mean(), list(learning.values()), allow_unused=True)
        logits = next((leaf for leaf in result[1:] if isinstance(leaf, Tensor)), first)
        found = {name: g for name, g in zip(learning, gradients, strict=True) if g is not None}
        return {"": logits.detach().float()} | found


@contextmanager
def _as_it_was(compiled: CompiledModule, state: dict[str, Tensor]) -> Iterator[None]:
    """With `state`, in eval; and afterwards as before."""
    training = compiled.training
    before = {name: get_attribute(compiled, name).detach().clone() for name in state}
    compiled.eval()
    try:
        with torch.no_grad():
            for name, tensor in state.items():
                get_attribute(compiled, name).copy_(tensor)
        with torch.enable_grad():
            yield
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                get_attribute(compiled, name).copy_(tensor)
        compiled.train(training)
