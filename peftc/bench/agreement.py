"""Whether variants of one model compute the same: their losses, and the gradients of what learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peftc.bench.batches import Arguments
from peftc.bench.variants import FLOOR, FUSED, PLAIN, Variant

# Of the loss, relative: fp32 sums in another order. Elsewhere four roundings of the precision computed in, since
# every layer rounds what it hands on, and a fusion rounds less often.
LOSS_FP32, ROUNDINGS = 1e-5, 4
# Of gradients, relative to the largest entry of the same tensor: sums over all tokens, through all layers. Beside
# float64 the plain graph of SmolLM2 is itself off by up to 1.1e-4 in one of them, the fused by 2.6e-4, by the adapter.
GRADIENT_FP32 = 1e-3


@dataclass(frozen=True)
class Behaviour:
    """The loss of one step, and the gradients it leaves: whole for peftc's own modules, else their norm only."""

    loss: float
    norm: float
    trainable: int
    gradients: Mapping[str, Tensor]
    dtype: torch.dtype


def behaviour(variant: Variant, arguments: Arguments, *, training: bool) -> Behaviour:
    """One step of `variant`; without `training` its dropout is off."""
    assert variant.module is not None
    variant.module.train(training)
    loss = variant.loss(arguments)
    loss.backward()
    learning = variant.trainable()
    gradients = {name: p.grad.detach().clone() for name, p in learning.items() if p.grad is not None}
    variant.drop_gradients()
    variant.module.train()
    norm = float(torch.stack([g.float().norm() for g in gradients.values()]).norm()) if gradients else 0.0
    dtype = next(variant.module.parameters()).dtype
    own = gradients if variant.name in (FUSED, PLAIN) else {}
    return Behaviour(loss.item(), norm, sum(p.numel() for p in learning.values()), own, dtype)


def differences(found: Mapping[str, Behaviour]) -> dict[str, str]:
    """What each variant computes otherwise than the plain graph does, for those that do.

    Gradients of HF PEFT's model have other names and shapes: their common norm is compared, where as many learn.
    """
    oracle = found[PLAIN]
    problems = {}
    for name, seen in found.items():
        if name.endswith(FLOOR):
            continue
        rounding = ROUNDINGS * torch.finfo(seen.dtype).eps
        for what, own, expected, near in (
            ("loss", seen.loss, oracle.loss, max(LOSS_FP32, rounding)),
            ("gradient norm", seen.norm, oracle.norm, max(GRADIENT_FP32, rounding)),
        ):
            comparable = what == "loss" or seen.trainable == oracle.trainable
            if comparable and not abs(own - expected) <= near * abs(expected):
                problems[name] = f"{what} is {own:.7g}, of the plain graph {expected:.7g}"
                break
        else:
            if worst := _worst(seen, oracle, max(GRADIENT_FP32, rounding)):
                problems[name] = worst
    return problems


def _worst(seen: Behaviour, oracle: Behaviour, near: float) -> str | None:
    """The parameter whose gradient is furthest off, if it is further than `near`."""
    off = {}
    for name, gradient in seen.gradients.items():
        expected = oracle.gradients[name]
        off[name] = float((gradient - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    worst = max(off, key=lambda name: off[name], default="")
    return f"the gradient of {worst} is off by {off[worst]:.1e}" if worst and not off[worst] <= near else None
