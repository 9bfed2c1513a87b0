"""Models with methods that act while they train, a loop that trains them, and comparisons of what came of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import peftc
from peftc.graph.ir import get_attribute
from peftc.planning.plan import Binding
from zoo import VOCABULARY, ZOO

# Slices of a fused weight and transposed weights, n_in != n_out, beside parameters with no schedule.
RELORA = "apply relora(r=2, alpha=6, every=3, warmup=2) to attn.q, attn.v, mlp.up\ntrain norm"


@cache
def _compiled(name: str, spec: str) -> peftc.CompiledModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peftc.compile(ZOO[name](), spec)


def compiled(name: str, spec: str) -> peftc.CompiledModule:
    """A copy of its own of a zoo model that was compiled once."""
    return copy.deepcopy(_compiled(name, spec)).train()


def batch(step: int = 0) -> dict[str, Tensor]:
    """Other tokens in each step, two texts of six."""
    tokens = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(step))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def train(model: Callable[..., Any], optimizer: Optimizer, steps: range) -> list[float]:
    """One batch a step, numbered from 1; random numbers depend on the step alone. Returns the losses."""
    losses = []
    for step in steps:
        torch.manual_seed(step)
        loss = model(**batch(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adamw(model: peftc.CompiledModule, lr: float = 1e-2, **settings: Any) -> AdamW:
    """With weight decay: a wrong length of a step shows in both of its parts."""
    return AdamW(model.trainable_parameters().values(), lr=lr, **{"weight_decay": 0.1, **settings})


def logits(model: nn.Module) -> Tensor:
    """What it computes in eval mode."""
    training = model.training
    with torch.no_grad():
        found: Tensor = model.eval()(**batch()).logits
    model.train(training)
    return found


def tensors(model: peftc.CompiledModule, binding: Binding) -> dict[str, Tensor]:
    return {name: get_attribute(model, full) for name, full in binding.names.items()}


def copies(model: peftc.CompiledModule) -> list[dict[str, Tensor]]:
    """The state of each binding, as it is now."""
    return [
        {name: tensor.detach().clone() for name, tensor in tensors(model, binding).items()}
        for binding in model.plan.bindings
    ]


def equal(actual: peftc.CompiledModule, expected: peftc.CompiledModule, tolerance: float = 0.0) -> None:
    """All that peftc added, and what the models compute."""
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(actual.state_dict()[name], tensor, rtol=0, atol=tolerance, msg=name)
    torch.testing.assert_close(logits(actual), logits(expected), rtol=0, atol=tolerance)
