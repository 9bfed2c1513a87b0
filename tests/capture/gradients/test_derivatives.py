"""Functions with a derivative of their own: a graph has what they compute, and that may have another."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import peftc


class Straight(torch.autograd.Function):
    """Rounds, and lets gradients through as if it did not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Square(torch.autograd.Function):
    """What autograd would find, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return cast(Tensor, 2 * gradients[0] * ctx.saved_tensors[0])


class Apart(torch.autograd.Function):
    """Twice the gradient, in the newer spelling."""

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return 2 * gradients[0] * ctx.factor, None


class Part(nn.Module):
    def __init__(self, function: Any, *more: float) -> None:
        super().__init__()
        self.layer, self.function, self.more = nn.Linear(6, 6), function, more

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.function.apply(3 * self.layer(x), *self.more)
        return made


@pytest.mark.parametrize(
    ("function", "more", "islands"), [(Straight, (), ["1"]), (Square, (), []), (Apart, (0.5,), ["1"])]
)
def test_gradients_are_those_that_a_function_says(function: Any, more: tuple[float, ...], islands: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), Part(function, *more), nn.Linear(6, 4))
    x = torch.randn(3, 5)
    compiled = peftc.compile(model, "train linear", example=x)
    assert [island.path for island in compiled.plan.captured.islands] == islands
    for result in (compiled(x), model(x)):
        result.square().sum().backward()
    for name, parameter in compiled.trainable_parameters().items():
        expected = model.get_parameter(name).grad
        assert parameter.grad is not None
        assert expected is not None
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_left_behind() -> None:
    before = vars(torch.autograd.Function)["apply"]
    peftc.compile(nn.Sequential(nn.Linear(5, 6), Part(Straight)), "train linear", example=torch.randn(3, 5))
    assert vars(torch.autograd.Function)["apply"] is before


class Head(nn.Module):
    """Reads a weight that it holds itself, by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.table(tokens)
        return found * 2 if float(found.detach().sum()) > 1e9 else found


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = Head()
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.head.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.out(torch.tanh(self.head(tokens)))
        return result


def test_a_weight_that_an_island_reads_too_changes_for_the_layer_alone() -> None:
    torch.manual_seed(0)
    model, tokens = Tied(), torch.randint(0, 11, (3, 4))
    compiled = peftc.compile(model, "apply lora(r=2) to linear", example=tokens)
    assert [island.path for island in compiled.plan.captured.islands] == ["head"]
    with torch.no_grad():
        for parameter in compiled.trainable_parameters().values():
            parameter.add_(torch.randn_like(parameter))
    expected = compiled.eval()(tokens)
    assert (expected - model(tokens)).abs().max() > 0.1
    torch.testing.assert_close(compiled.merge()(tokens), expected, rtol=1e-5, atol=1e-5)
