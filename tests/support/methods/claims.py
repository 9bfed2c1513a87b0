"""What section E of the methods' table claims of every method, as functions of one compiled model."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, fx, nn

import peftc
from peftc.graph.ir import get_attribute
from peftc.planning.plan import Binding
from peftc.protocol.site import Projection, Site
from subjects import Compiled, close


def starts_as_the_base(case: Compiled) -> None:
    with torch.no_grad():
        close(case.subject.outputs(case.module), case.subject.outputs(case.frozen), case.subject.tolerance)


def learns_what_it_declares_and_nothing_else(case: Compiled) -> None:
    plan, module = case.module.plan, case.module
    declared = {*plan.trained} | {name for name, state in plan.tensors.items() if state.trainable}
    everything = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    # Several random states: where one closes every ReLU of an adapter one unit wide, another opens it.
    reached: set[str] = set()
    with biases_of_numbers(case):
        for seed in range(2, 12):
            case.randomise(seed)
            case.subject.loss(module).backward()
            reached |= {key for key, tensor in everything.items() if tensor.grad is not None and tensor.grad.any()}
            if reached >= declared:
                break
    assert reached == declared
    case.reset()

    start = {key: tensor.detach().clone() for key, tensor in everything.items()}
    with torch.no_grad():
        loss = case.subject.loss(module)
    assert any(lowers_the_loss(case, rate, steps, loss) for rate, steps in ((1e-2, 10), (0.3, 10), (1e-2, 50)))
    changed = {key for key, tensor in everything.items() if not torch.equal(tensor, start[key])}
    assert changed
    assert changed <= declared
    assert case.subject.is_untouched()


@contextmanager
def biases_of_numbers(case: Compiled) -> Iterator[None]:
    """Biases that are zeros are none for a while: what multiplies them would have no gradient."""
    names = {binding.site.bias for binding in case.module.plan.bindings if isinstance(binding.site, Projection)}
    own = (bias for name, bias in case.module.named_parameters() if name in names)
    zeros = [bias for bias in own if not bias.requires_grad and not bias.any()]
    try:
        for bias in zeros:
            bias.copy_(torch.linspace(-0.1, 0.1, len(bias)))
        yield
    finally:
        for bias in zeros:
            bias.zero_()


def lowers_the_loss(case: Compiled, rate: float, steps: int, loss: Tensor) -> bool:
    """From the start. A small rate may be too small to see behind a gate that starts at zero; where five numbers learn,
    the noise of the model's dropout may be larger than what ten steps win.
    """
    case.reset()
    module = case.module.train()
    optimizer = torch.optim.Adam(module.param_groups(lr=rate))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)  # of the dropout
        for _ in range(steps):
            optimizer.zero_grad()
            case.subject.loss(module).backward()
            optimizer.step()
    module.eval()
    with torch.no_grad():
        return bool(case.subject.loss(module) < loss)


def comes_back_from_disk(case: Compiled, folder: Path) -> None:
    case.randomise()
    case.module.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.safetensors", "peftc.json"]
    assert safetensors.torch.load((folder / "adapter.safetensors").read_bytes()).keys() == case.start.keys()
    json.loads((folder / "peftc.json").read_text())
    loaded = peftc.load(folder, case.subject.base).eval()
    with torch.no_grad():
        assert torch.equal(case.subject.outputs(loaded), case.subject.outputs(case.module))
    assert loaded.trainable_parameters().keys() == case.module.trainable_parameters().keys()
    assert case.subject.is_untouched()


def unmergeable(case: Compiled) -> bool:
    """What the methods say of themselves: no plain weight does the same, or the layer lacks the bias to shift."""
    return any(
        binding.method.unmergeable_at(binding.site)
        or (binding.method.adds_bias(binding.site) and getattr(binding.site, "bias", None) is None)
        for binding in case.module.plan.bindings
    )


def merges_or_says_why_not(case: Compiled) -> None:
    case.randomise()
    if unmergeable(case):
        with pytest.raises(peftc.PeftcError) as raised:
            case.module.merge()
        assert {diagnostic.code for diagnostic in raised.value.diagnostics} == {"cannot-merge"}
        return
    merged = case.module.merge()
    assert type(merged) is type(case.subject.base)
    assert merged.state_dict().keys() == case.subject.before.keys()
    assert not any(isinstance(part, fx.GraphModule) for part in merged.modules())
    with torch.no_grad():
        close(case.subject.outputs(merged.eval()), case.subject.outputs(case.module), case.subject.tolerance)
    assert case.subject.is_untouched()


def with_dense_weights(case: Compiled) -> nn.Module:
    """The base model with each weight as the definitions have it: prepared, rounded by its storage, folded."""
    model = copy.deepcopy(case.subject.base)
    plan = case.module.plan
    for binding in plan.bindings:
        weight, _, rows, state = parts(case, model, binding)
        own = place_of(binding.site, rows)
        weight[own] = binding.method.prepare(binding.site, weight[own], state)
    for name, item in plan.packed.items():
        stored = get_attribute(model, name)
        stored.copy_(item.unpack(item.pack(stored)))
    for binding in plan.bindings:
        weight, bias, rows, state = parts(case, model, binding)
        part = None if bias is None else bias[rows]
        own = place_of(binding.site, rows)
        weight[own], shifted = binding.method.fold(binding.site, weight[own], part, state)
        if bias is not None:
            assert shifted is not None
            bias[rows] = shifted
    return model


def place_of(site: Site, rows: list[int]) -> Any:
    """Where in a weight its rows are; a kernel's are in front."""
    return (..., rows, slice(None)) if getattr(site, "features_last", True) else rows


def parts(
    case: Compiled, model: nn.Module, binding: Binding
) -> tuple[Tensor, Tensor | None, list[int], dict[str, Tensor]]:
    """A site's weight and bias in `model`, the rows of them that are its own, and its method's state."""
    site = binding.site
    assert isinstance(site, Projection)
    stored = get_attribute(model, site.owner)
    weight = stored.transpose(-2, -1) if site.transposed else stored
    rows = list(site.rows if site.rows is not None else range(site.n_out))
    state = {name: get_attribute(case.module, full) for name, full in binding.names.items()}
    return weight, get_attribute(model, site.bias) if site.bias else None, rows, state
