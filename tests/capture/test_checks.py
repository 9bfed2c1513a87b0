"""Checks of a forward on what it is given: a compiled model makes them, too."""

from __future__ import annotations

from types import CodeType
from typing import cast

import pytest
import torch
from torch import Tensor, nn

import peftc
from peftc.capture.checks import must_be


class Checking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(9, 6), nn.Linear(6, 6)

    def forward(self, input_ids: Tensor) -> Tensor:
        if not input_ids.max().item() <= 8:
            raise ValueError("no such token")
        if (input_ids == 3).any():
            raise ValueError(f"3 is not allowed, {input_ids.shape}")
        return cast(Tensor, self.layer(self.embed(input_ids)))


def test_a_check_is_one_of_the_graph() -> None:
    model = Checking()
    compiled = peftc.compile(model, "apply lora(r=2) to linear", example=torch.tensor([[1, 2], [4, 8]]))
    assert not compiled.plan.captured.islands
    good = torch.tensor([[1, 2, 5]])
    torch.testing.assert_close(compiled(good), model(good), rtol=0, atol=0)  # lora begins as nothing
    compiled(good).sum().backward()
    with pytest.raises(ValueError, match="3 is not allowed"):
        model(torch.tensor([[1, 2, 3]]))
    with pytest.raises(RuntimeError, match=r"own check fails: .*test_checks.py.*input_ids == 3"):
        compiled(torch.tensor([[1, 2, 3]]))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if (x.abs() > 100).any():
            raise ValueError("too large")
        return x + cast(Tensor, self.layer(x)).tanh()


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_the_checks_of_equal_blocks_are_made_in_every_mode(mode: str) -> None:
    model = nn.ModuleDict({"blocks": nn.Sequential(Block(), Block(), Block()), "head": nn.Linear(6, 2)})
    model.forward = lambda x: model["head"](model["blocks"](x))
    compiled = peftc.compile(model, "apply lora(r=2) to linear", example=torch.randn(2, 6)).train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        assert compiled(torch.randn(3, 6)).shape == (3, 2)
        with pytest.raises(RuntimeError, match="own check fails"):
            compiled(torch.full((3, 6), 1000.0))


class Catching(Block):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x)
        except ValueError:
            return super().forward(x / 1000)


def test_a_check_that_the_model_catches_is_none_of_the_graph() -> None:
    model = nn.Sequential(Catching(), nn.Linear(6, 2))
    compiled = peftc.compile(model, "apply lora(r=2) to linear", example=torch.randn(2, 6))
    for x in (torch.randn(3, 6), torch.full((3, 6), 1000.0)):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)  # lora begins as nothing


def _branches(source: str) -> list[bool]:
    """Of each branch with one way that raises, in order, what its condition must be."""
    (code,) = (one for one in compile(source, "model.py", "exec").co_consts if isinstance(one, CodeType))
    return [found for place in range(0, len(code.co_code), 2) if (found := must_be(code, place)) is not None]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("assert a", [True]),
        ("assert not a", [False]),
        ("assert a and b, f'{a} is not {b}'", [True, True]),
        ("if not a: raise ValueError(a)", [True]),
        ("if a == b: raise ValueError\n return 1", [False]),
        ("if a: return 2\n return 1", []),
        ("if a:\n  print(a)\n  if b: raise ValueError(b)", [False]),
        ("return a if b else 1", []),
    ],
)
def test_what_a_condition_must_be(body: str, expected: list[bool]) -> None:
    assert _branches(f"def forward(a, b):\n {body}\n") == expected
