"""Two passes of one training step and a loss on how far they differ, for methods that pick at random (AdaMix)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

IGNORED = -100  # a label that no loss counts


def two_passes(
    run: Callable[[], Sequence[Any]], weight: float, logits: Sequence[int], labels: Tensor | None
) -> tuple[Any, ...]:
    """The leaves of the first of two passes, with the loss of both in its place, which is the first leaf.

    (L(p) + L(q)) / 2 + weight · (KL(p ‖ q) + KL(q ‖ p)) / 2, where p and q are the softmax of either pass, summed over
    the leaves `logits`, and a divergence is the mean over all predictions. Where there is a label a prediction, those
    labelled -100 do not count. Wang et al. 2022, arXiv:2205.12410, section 3.2.
    """
    first, second = run(), run()
    apart = sum(symmetric_divergence(first[leaf], second[leaf], _labelled(first[leaf], labels)) for leaf in logits)
    return (first[0] + second[0]) / 2 + weight * apart, *first[1:]


def _labelled(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    if labels is None or labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        return None
    return labels.flatten() != IGNORED


def symmetric_divergence(p: Tensor, q: Tensor, kept: Tensor | None = None) -> Tensor:
    """The mean of both Kullback-Leibler divergences between two tensors of logits [..., classes], a scalar.

    `kept`: which of the predictions count, flat; all of them by default.
    """
    at_least = torch.promote_types(p.dtype, torch.float32)
    p, q = (log_softmax(given.flatten(0, -2).to(at_least), -1) for given in (p, q))
    each = (kl_div(p, q, reduction="none", log_target=True) + kl_div(q, p, reduction="none", log_target=True)).sum(-1)
    weights = torch.ones_like(each) if kept is None else kept.to(each.dtype)
    return (each * weights).sum() / (2 * weights.sum().clamp_min(1))
