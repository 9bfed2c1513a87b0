"""Methods' formulas, written out with hooks on the base, to compare compiled models with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import peftc
from peftc.driver.compiled import CompiledModule
from peftc.graph.ir import get_attribute
from peftc.planning.plan import Binding
from peftc.protocol.site import Linear
from zoo import ZOO, inputs

CLOSE: Any = {"rtol": 1e-5, "atol": 1e-5}  # single precision, in another order of additions
State = dict[str, Tensor]


@cache
def base(name: str) -> PreTrainedModel:
    model: PreTrainedModel = ZOO[name]().eval()
    return model


def compiled(name: str, spec: str, *, seed: int = 0, calibration: Any = None) -> CompiledModule:
    torch.manual_seed(seed)
    return peftc.compile(base(name), spec, calibration=calibration).eval()


def randomised(name: str, spec: str, seed: int = 0) -> CompiledModule:
    """With random values in all that learns: zeros would hide mistakes."""
    model = compiled(name, spec)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    return model


def state_of(model: CompiledModule, binding: Binding) -> State:
    """A copy of a site's tensors, those that learn with gradients of their own."""
    found = {name: get_attribute(model, full).detach().clone() for name, full in binding.names.items()}
    return {name: t.requires_grad_() if t.is_floating_point() else t for name, t in found.items()}


Hook = Callable[[Tensor, Tensor, State], Tensor]


@contextmanager
def hooked(name: str, model: CompiledModule, states: Sequence[State], function: Hook) -> Iterator[None]:
    """The base with each site's output as `function(x, y, state)` has it."""
    handles: list[Any] = []
    for binding, state in zip(model.plan.bindings, states, strict=True):
        site = binding.site
        if not isinstance(site, Linear):
            handles += _around_feed_forward(base(name), site.name, state, function)
            continue

        def hook(_module: Any, args: Any, y: Tensor, site: Linear = site, state: State = state) -> Tensor:
            if site.rows is None:
                return function(args[0], y, state)
            rows = torch.tensor(site.rows)
            return y.index_copy(-1, rows, function(args[0], y[..., rows], state))

        layer = base(name).get_submodule(site.weight.removesuffix(".weight"))
        handles.append(layer.register_forward_hook(hook))
    yield
    for handle in handles:
        handle.remove()


def _around_feed_forward(model: nn.Module, name: str, state: State, function: Hook) -> Iterator[Any]:
    """BERT's: x enters `intermediate`, h leaves `output.dense`."""
    block = name.removesuffix(".mlp")
    entered: list[Tensor] = []
    first, last = model.get_submodule(f"{block}.intermediate"), model.get_submodule(f"{block}.output.dense")
    yield first.register_forward_pre_hook(lambda _module, args: entered.append(args[0]))
    yield last.register_forward_hook(lambda _module, _args, h: function(entered.pop(), h, state))


def agree(name: str, model: CompiledModule, function: Hook, of: Callable[[State], State] = dict) -> None:
    """Logits and gradients of `model` are those of the base with hooks; `of` says what a site's tensors mean."""
    batch = inputs(base(name))
    states = [state_of(model, binding) for binding in model.plan.bindings]
    with hooked(name, model, [of(state) for state in states], function):
        expected = base(name)(**batch)
    actual = model(**batch)
    torch.testing.assert_close(actual.logits, expected.logits, **CLOSE)
    assert (actual.logits - base(name)(**batch).logits).abs().max() > 1e-2, "the method does something"
    actual.loss.backward()
    expected.loss.backward()
    for binding, state in zip(model.plan.bindings, states, strict=True):
        for key, full in binding.names.items():
            if binding.tensors[full].trainable:
                torch.testing.assert_close(get_attribute(model, full).grad, state[key].grad, **CLOSE)
    for parameter in base(name).parameters():
        parameter.grad = None


def lora_branch(x: Tensor, state: State, prefix: str = "method.") -> Tensor:
    return 16 / state[f"{prefix}A"].shape[0] * (x @ state[f"{prefix}A"].t() @ state[f"{prefix}B"].t())


def adapter_branch(h: Tensor, state: State) -> Tensor:
    inner = F.relu(h @ state["method.down"].t() + state["method.down_bias"])
    return inner @ state["method.up"].t() + state["method.up_bias"]


def gate(x: Tensor, state: State) -> Tensor:
    """Mao et al. 2021, section 3: one number a position, from what enters."""
    return torch.sigmoid((x * state["w"][0]).sum(-1, keepdim=True) + state["b"])
