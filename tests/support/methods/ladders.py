"""Zoo models with a ladder, and a mark that runs a test on each of them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

import peftc
from peftc.driver.compiled import CompiledModule
from zoo import ZOO

QUICK = ("llama", "gpt2", "bert", "t5", "vit")
SPEC = "apply ladder(reduction=4) to block"


def per_model(names: tuple[str, ...] = tuple(ZOO)) -> pytest.MarkDecorator:
    """One worker of pytest-xdist gets all tests of a model."""
    marks = {name: [] if name in QUICK else [pytest.mark.slow] for name in names}
    params = [pytest.param(name, marks=[pytest.mark.xdist_group(name), *marks[name]]) for name in names]
    return pytest.mark.parametrize("name", params)


def compiled(name: str, spec: str = SPEC, seed: int | None = 0) -> CompiledModule:
    """A ladder on a zoo model in eval mode, with random state unless `seed` is None."""
    torch.manual_seed(0)
    module = peftc.compile(base_of(name), spec).eval()
    if seed is not None:
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.trainable_parameters().values():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    return module


@cache
def base_of(name: str) -> PreTrainedModel:
    """One model for all compiles, which share its capture."""
    model: PreTrainedModel = ZOO[name]().eval()
    return model
