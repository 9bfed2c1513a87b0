"""The models that conformance is tested on, and what is compiled on them, once for all tests of a process."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftc
from peftc.graph.ir import get_attribute
from peftc.spec.check import as_spec
from peftc.spec.resolve import resolve
from zoo import ZOO, inputs

torch.set_num_threads(1)

# Largest difference of two outputs that were computed in another order, by other libraries' products: a few hundred
# roundings of 6e-8 (float32, where T5's outputs are larger than 1) and of 1e-16 (float64, where the softmax and the
# GELU's erf are also good to 1e-15).
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-12}


class Layer(nn.Module):
    """A transformer block in which no layer is square, and some have no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.second_norm = nn.LayerNorm(24), nn.LayerNorm(24)
        self.query, self.key, self.value = (nn.Linear(24, 16, bias=bias) for bias in (False, True, False))
        self.out = nn.Linear(16, 24)
        self.wide, self.narrow = nn.Linear(24, 40, bias=False), nn.Linear(40, 24)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden)
        q, k, v = (
            layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )  # fmt: skip
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        hidden = hidden + self.out(mixed)
        return hidden + torch.as_tensor(self.narrow(F.gelu(self.wide(self.second_norm(hidden)))))


class Plain(nn.Module):
    """A model that no library knows: peftc sees nothing but `forward` and `example=`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return torch.as_tensor(self.head(x))


class Convolved(nn.Module):
    """Convolutions of which none is square: strided, grouped, dilated, with odd kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2))
        self.grouped = nn.Conv2d(6, 8, 3, padding="same", groups=2, bias=False)
        self.along = nn.Conv1d(8, 10, 3, dilation=2, padding=2)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.grouped(F.gelu(self.first(x))))
        return torch.as_tensor(self.head(self.along(x.flatten(2)).mean(-1)))


class Looking(nn.Module):
    """Two tables, of which one is looked into twice, by numbers that an input says and by places."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(17, 24, padding_idx=2), nn.Embedding(9, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        words = (4 * x).long().clamp(0, 16)
        places = self.places(torch.arange(x.shape[1]))
        return torch.as_tensor(self.head(F.gelu(self.words(words) + places) * self.words(16 - words)))


# Models that no library knows, and the shape of their input.
OWN: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "plain": (Plain, (3, 6, 24)),
    "convolved": (Convolved, (3, 4, 6, 5)),
    "looking": (Looking, (8, 6)),
}


@dataclass
class Subject:
    """One base model, a batch for it, and what it held before anything was compiled."""

    name: str
    base: nn.Module
    batch: dict[str, Tensor]
    example: Any
    before: dict[str, Tensor]

    def outputs(self, module: nn.Module) -> Tensor:
        found = module(**self.batch)
        return found if isinstance(found, Tensor) else torch.as_tensor(found.logits)

    def loss(self, module: nn.Module) -> Tensor:
        """The model's own, or for a plain one the distance to an arbitrary target."""
        if self.name in OWN:
            outputs = self.outputs(module)
            return (outputs - torch.linspace(-1, 1, outputs.shape[-1], dtype=outputs.dtype)).square().mean()
        return torch.as_tensor(module(**self.batch).loss)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[next(self.base.parameters()).dtype]

    def is_untouched(self) -> bool:
        now = self.base.state_dict()
        gradients = [parameter.grad for parameter in self.base.parameters() if parameter.grad is not None]
        same = all(torch.equal(now[name], tensor) for name, tensor in self.before.items())
        return not gradients and same and now.keys() == self.before.keys()


@cache
def subject(name: str) -> Subject:
    if name in OWN:
        made, shape = OWN[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            base = made().double()
            batch = {"x": torch.randn(shape, dtype=torch.float64)}
    else:
        zoo_model = ZOO[name]()
        base, batch = cast(nn.Module, zoo_model), inputs(zoo_model)
    base.eval()
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    return Subject(name, base, batch, batch if name in OWN else None, before)


@dataclass
class Compiled:
    """A model compiled once for all tests of a case; `reset` puts it back to its start."""

    subject: Subject
    module: peftc.CompiledModule
    start: dict[str, Tensor]

    @cached_property
    def frozen(self) -> nn.Module:
        """What the method stands on: the base model, with what the spec quantises rounded."""
        stored = self.module.plan.packed
        model = copy.deepcopy(self.subject.base) if stored else self.subject.base
        with torch.no_grad():
            for name, item in stored.items():
                weight = get_attribute(model, name)
                weight.copy_(item.unpack(item.pack(weight)))
        return model

    def reset(self) -> None:
        self.module.load_state_dict(self.start)
        self.module.eval()
        for parameter in self.module.parameters():
            parameter.grad = None

    def randomise(self, seed: int = 2) -> None:
        """Random values in all that learns: a zero B would hide what A does."""
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.module.trainable_parameters().values():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype))


@cache
def _compiled(name: str, spec: str) -> Compiled:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        wants = any(application.method.data for application in resolve(as_spec(spec)).applications)
        data = [subject(name).batch] if wants else None
        module = peftc.compile(subject(name).base, spec, example=subject(name).example, calibration=data)
    return Compiled(subject(name), module, {key: tensor.clone() for key, tensor in module.state_dict().items()})


def compiled(name: str, spec: str) -> Compiled:
    case = _compiled(name, spec)
    case.reset()
    return case


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
