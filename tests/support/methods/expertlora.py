"""Models with LoRA on their stacked expert weights, compiled once for all tests of a process."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

import peftc
from zoo import ZOO

NEAR = 1e-5  # fp32, two implementations of one sum
SPEC = "apply lora(r=2, alpha=6) to expert"
MODELS = ["mixtral", "qwen2_moe"]


def randomised(compiled: peftc.CompiledModule) -> peftc.CompiledModule:
    """With state that is no start: a zero B would hide what is wrong with A."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in compiled.trainable_parameters().values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return compiled.eval()


@cache
def base(name: str) -> Any:
    return ZOO[name]().eval()


@cache
def compiled_once(name: str, spec: str) -> peftc.CompiledModule:
    return peftc.compile(base(name), spec)


def compiled(name: str, spec: str) -> peftc.CompiledModule:
    """Compiled once for all tests of a process; with the same random state and no gradients each time."""
    module = randomised(compiled_once(name, spec))
    for parameter in module.parameters():
        parameter.grad = None
    return module
