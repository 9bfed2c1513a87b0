"""Several texts in a row, told apart by their positions: whether a graph makes of each what it makes of it alone.

What makes tokens of one row know of each other is not only attention: a convolution, a recurrence, a prompt in front.
So it is tried, once, on two of the texts that a call has: nothing of the first may be seen in what is made of the
second, and that must be what is made of the second by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftc.capture.convention import LOSS_INPUTS
from peftc.capture.texts import MASK, POSITIONS, firsts
from peftc.diagnostics.diagnostic import PeftcError
from peftc.runtime.errors import NeedsLabels, TextsMix

TOKENS = 64  # of each of the two texts
# Relative to the size of all numbers. Nothing that is seen of the first text changes not even a rounding, but where
# tokens are sorted, as by experts; in another place of another product numbers are rounded otherwise.
UNSEEN = {torch.float32: 1e-5, torch.float64: 1e-10}
ALONE = {torch.float32: 2e-4, torch.float64: 1e-8}
IN_HALF = 5e-2


def by_row(given: dict[str, Any]) -> dict[str, Any]:
    """The inputs with positions for each row: one row of them may be given for all."""
    positions, main = given.get(POSITIONS), next(iter(given.values()), None)
    if not isinstance(positions, Tensor) or not isinstance(main, Tensor) or positions.dim() != 2 or main.dim() < 2:
        return given
    if positions.shape[0] != 1 or main.shape[0] == 1:
        return given
    return {**given, POSITIONS: positions.expand(main.shape[0], -1)}


def keeps_apart(graph: Any, given: Mapping[str, Any]) -> bool:
    """Whether the inputs have several texts in a row, which `graph`, a compiled model's, keeps apart.

    Raises:
        PeftcError: `texts-mix` where they have and it does not.
    """
    positions = given.get(POSITIONS)
    if not isinstance(positions, Tensor) or positions.dim() != 2 or MASK in given or positions.is_meta:
        return False
    begins = firsts(positions)
    if not bool(begins[:, 1:].any()):
        return False
    model = graph.plan.sites.model
    main = graph.convention.inputs[0]
    both, second = _two_texts(given, begins, positions.shape[1])
    length, other = second, {**both, main: _otherwise(both[main], second)}
    alone = {
        name: item[:, -length:] if _by_token(item, both[POSITIONS].shape[1]) else item for name, item in both.items()
    }
    if any(graph.size_check.refusal(probe) is not None for probe in (both, alone)):
        raise PeftcError(TextsMix(model=model, reason="its graph is for rows of one length alone"))
    with _at_rest(graph):
        made, changed, single = (_made(graph, probe) for probe in (both, other, alone))
    total = both[POSITIONS].shape[1]
    compared = False
    for ours, others, own in zip(made, changed, single, strict=True):
        parts = [item[:, -length:] if _by_token(item, total) else item for item in (ours, others)]
        if parts[0].shape != own.shape:
            continue
        compared = True
        if not _off(parts[1], parts[0]) <= UNSEEN.get(own.dtype, IN_HALF):  # also where it is no number
            raise PeftcError(TextsMix(model=model, reason="each sees something of those before it"))
        if not _off(parts[0], own) <= ALONE.get(own.dtype, 2 * IN_HALF):
            raise PeftcError(TextsMix(model=model, reason="it counts their tokens otherwise"))
    if not compared:
        raise PeftcError(TextsMix(model=model, reason="nothing that it returns is of each token"))
    return True


def _two_texts(given: Mapping[str, Any], begins: Tensor, tokens: int) -> tuple[dict[str, Any], int]:
    """The inputs cut to two texts that follow each other, the shorter of which is long, and the second's length.

    All rows are that one.
    """
    pairs = [
        (min(middle - start, stop - middle), row, start, middle, stop)
        for row, begun in enumerate(begins.cpu())
        for start, middle, stop in _in_threes([*begun.nonzero().flatten().tolist(), tokens])
    ]
    _, row, start, middle, stop = max(pairs)
    first, second = slice(start, min(middle, start + TOKENS)), slice(middle, min(stop, middle + TOKENS))

    def cut(item: Any) -> Any:
        if not isinstance(item, Tensor) or not item.dim() or item.shape[0] != begins.shape[0]:
            return item
        same = item[row : row + 1].expand_as(item)
        return torch.cat([same[:, first], same[:, second]], 1) if _by_token(item, tokens) else same

    return {name: cut(item) for name, item in given.items()}, second.stop - second.start


def _in_threes(places: list[int]) -> Iterator[tuple[int, int, int]]:
    return zip(places, places[1:], places[2:], strict=False)


def _by_token(item: Any, tokens: int) -> bool:
    return isinstance(item, Tensor) and item.dim() > 1 and item.shape[1] == tokens


def _otherwise(main: Tensor, kept: int) -> Tensor:
    """The tokens, or their embeddings, with others in place of all but the last ones."""
    front, last = main[:, :-kept], main[:, -kept:]
    if main.is_floating_point():
        return torch.cat([1 - front, last], 1)
    largest = main.max().clamp_min(1)
    return torch.cat([torch.where(front == largest, 0, largest), last], 1)


@contextmanager
def _at_rest(graph: nn.Module) -> Iterator[None]:
    """Nothing is dropped out, and nothing learns."""
    modes = {module: module.training for module in graph.modules()}
    graph.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _made(graph: Any, given: Mapping[str, Any]) -> list[Tensor]:
    """What is made of the tokens, or of the rows as a whole."""
    try:
        result = graph._run({name: item for name, item in given.items() if name not in LOSS_INPUTS}, None)
    except PeftcError as error:
        if not isinstance(error.diagnostics[0], NeedsLabels):
            raise
        result = graph._run(dict(given), None)
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point() and leaf.dim() > 1]


def _off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))
