"""What LoRA means, on the eager model: weights with B A added, and the gradients of A and B by the chain rule."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import peftc
from foreign import Example
from peftc.graph.ir import get_attribute
from peftc.protocol.site import Projection

R, ALPHA = 4, 16
LORA = f"lora(r={R}, alpha={ALPHA})"


@dataclass
class Answer:
    """What a model makes of a batch, and the gradients of what learns."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]


def call(model: nn.Module, given: Example) -> Any:
    return model(**given) if isinstance(given, dict) else model(*given)


def outputs(result: Any) -> list[Tensor]:
    """The numbers in a result, whatever holds them."""
    held = list(result.values()) if isinstance(result, Mapping) else result
    return [leaf for leaf in pytree.tree_leaves(held) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def loss(found: Iterable[Tensor]) -> Tensor:
    """One number that all numbers of a result have a part in, each another."""
    generator = torch.Generator().manual_seed(7)
    weighted = [(one * torch.randn(one.shape, generator=generator, dtype=one.dtype)).sum() for one in found]
    return torch.stack(weighted).sum()


def in_float64(model: nn.Module, given: Example) -> tuple[nn.Module, Example]:
    """There a mistake is told from a rounding."""
    cast: Example = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, given)
    return model.double(), cast


def of_three(given: Example) -> Example:
    """A batch of three; of what counts no rows as it is."""

    def more(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.flip(0)[:1]]) if tensor.dim() and tensor.shape[0] == 2 else tensor

    made: Example = pytree.tree_map_only(Tensor, more, given)
    return made


def shaken(compiled: peftc.CompiledModule) -> None:
    """All that learns away from where it starts."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in compiled.trainable_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.05)


def answer(compiled: peftc.CompiledModule, given: Example) -> Answer:
    compiled.zero_grad()
    found = outputs(call(compiled, given))
    loss(found).backward()
    learning = compiled.trainable_parameters()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in learning.items()}
    return Answer([one.detach() for one in found], gradients)


def expected(base: nn.Module, compiled: peftc.CompiledModule, given: Example) -> Answer:
    """The same of the eager model, for a spec of LoRA and parameters that train."""
    model = copy.deepcopy(base).requires_grad_(False)
    own = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in compiled.plan.trained:
            own[name].copy_(get_attribute(compiled, name))
        for site, names in adapted(compiled):
            A, B = (get_attribute(compiled, names[name]) for name in ("A", "B"))
            rows_of(site, own).add_(ALPHA / R * B @ A)
    for name in (*compiled.plan.trained, *(site.owner for site, _ in adapted(compiled))):
        own[name].requires_grad_()
    found = outputs(call(model, given))
    loss(found).backward()
    gradients = {name: grad(own[name]) for name in compiled.plan.trained}
    for site, names in adapted(compiled):
        A, B = (get_attribute(compiled, names[name]).detach() for name in ("A", "B"))
        G = ALPHA / R * rows_of(site, {site.owner: grad(own[site.owner])})
        gradients |= {names["A"]: B.T @ G, names["B"]: G @ A.T}
    return Answer([one.detach() for one in found], gradients)


def adapted(compiled: peftc.CompiledModule) -> Iterator[tuple[Projection, dict[str, str]]]:
    """Each linear layer that has a branch, and the names of its matrices."""
    for binding in compiled.plan.bindings:
        assert isinstance(binding.site, Projection)
        yield binding.site, dict(binding.names)


def grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def rows_of(site: Projection, own: Mapping[str, Tensor]) -> Tensor:
    """The view of a weight that a site is."""
    weight = own[site.owner].T if site.transposed else own[site.owner]
    return weight if site.rows is None else weight[site.rows[0] : site.rows[-1] + 1]


def differ(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """The largest difference, as a share of the largest number of its tensor."""
    pairs = zip(one, other, strict=True)
    with torch.no_grad():
        return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in pairs)
