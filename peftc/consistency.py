"""Two passes of one training step and a loss on how far they differ, for methods that pick at random (AdaMix)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax


def two_passes(run: Callable[[], Sequence[Any]], weight: float, logits: int) -> tuple[Any, ...]:
    """The leaves of the first of two passes, with the loss of both in its place, which is the first leaf.

    (L(p) + L(q)) / 2 + weight · (KL(p ‖ q) + KL(q ‖ p)) / 2, where p and q are the softmax of leaf `logits` in
    either pass, and a divergence is the mean over all predictions. Wang et al. 2022, arXiv:2205.12410, section 3.2.
    """
    first, second = run(), run()
    loss = (first[0] + second[0]) / 2 + weight * symmetric_divergence(first[logits], second[logits])
    return loss, *first[1:]


def symmetric_divergence(p: Tensor, q: Tensor) -> Tensor:
    """The mean of both Kullback-Leibler divergences between two tensors of logits [..., classes], a scalar."""
    at_least = torch.promote_types(p.dtype, torch.float32)
    p, q = (log_softmax(given.flatten(0, -2).to(at_least), -1) for given in (p, q))
    divergence: Tensor = kl_div(p, q, reduction="batchmean", log_target=True)
    return (divergence + kl_div(q, p, reduction="batchmean", log_target=True)) / 2
