"""Whether a model in parts computes what the whole one does, tried on numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from peftc.diagnostics.diagnostic import PeftcError
from peftc.distributed.errors import NotOnParts
from peftc.driver.compiled import CompiledModule
from peftc.graph.ir import get_attribute

# Sums over processes are made in another order: some hundred times the rounding of one number.
ROUNDINGS = 500.0
NOTHING = 1e-3  # of the steepest gradient: beside it the rounding of the others' sums counts
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
    given = _inputs(whole, random)
    what = whole.plan.sites.model
    if _draws(whole, given):
        reason = "it draws random numbers in training, and each process would draw others: leave dropout out"
        raise PeftcError(NotOnParts(what=what, reason=reason))
    drawn = {
        name: torch.randn(tensor.shape, generator=random).to(tensor).mul_(0.1).add_(tensor.detach())
        for name, tensor in whole.trainable_parameters().items()
    }
    expected = _step(whole, drawn, given)
    found = _step(part, {name: mine(name, tensor) for name, tensor in drawn.items()}, given)
    steepest = max((float(tensor.abs().max()) for name, tensor in expected.items() if name), default=0.0)
    for name, tensor in expected.items():
        wanted = tensor if name == "" else mine(name, tensor)
        size = max(float(tensor.abs().max()), NOTHING * steepest if name else 0.0)
        if not (found[name] - wanted).abs().max() <= ROUNDINGS * torch.finfo(whole.dtype).eps * size:
            reason = "it computes something else in parts" if name == "" else f"{name} has other gradients in parts"
            raise PeftcError(NotOnParts(what=_method(whole, name) if name else what, reason=reason))


def _inputs(compiled: CompiledModule, random: torch.Generator) -> list[Any]:
    """The example's, with tokens that differ: of equal ones attention learns nothing."""
    example, inputs = compiled.plan.captured.example, compiled.convention.inputs
    tokens = {sequence.tokens for sequence in compiled.plan.sites.sequences}
    rows = getattr(compiled.config, "vocab_size", 2)

    def one(name: str, value: Tensor) -> Tensor:
        if name not in tokens and name != "labels":
            return value.to(compiled.device)
        return torch.randint(0, rows, value.shape, generator=random).to(value.dtype).to(compiled.device)

    named = dict(zip(inputs, example.args, strict=False)) | dict(example.kwargs)
    return [one(name, named[name]) for name in inputs if name in named]


def _draws(compiled: CompiledModule, given: list[Any]) -> bool:
    """Whether two forward passes in training differ."""
    with torch.random.fork_rng(), torch.no_grad(), _as_it_was(compiled, {}):
        compiled.train()
        first, second = (pytree.tree_leaves(compiled(*given))[0].float() for _ in range(2))
        largest = ROUNDINGS * torch.finfo(compiled.dtype).eps * float(first.abs().max())
        return not bool((first - second).abs().max() <= largest)


def _method(compiled: CompiledModule, name: str) -> str:
    return next((b.method.name for b in compiled.plan.bindings if name in b.names.values()), name)


def _step(compiled: CompiledModule, state: dict[str, Tensor], given: list[Any]) -> dict[str, Tensor]:
    """The logits, or the first result, by the name '', and the gradients of the loss, or of the mean, by name."""
    with _as_it_was(compiled, state), torch.enable_grad():
        returned = compiled(*given)
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
        yield
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                get_attribute(compiled, name).copy_(tensor)
        compiled.train(training)
