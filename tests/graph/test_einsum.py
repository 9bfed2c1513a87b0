"""Sums of products that are products of matrices, written as such."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

import peftc

aten = torch.ops.aten
SIZES = {"b": 2, "h": 3, "i": 4, "j": 5, "d": 6, "k": 7}


class Summed(nn.Module):
    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation, self.layer = equation, nn.Linear(3, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return cast(Tensor, torch.einsum(self.equation, x, y) + self.layer(x.new_ones(3)))


@pytest.mark.parametrize(
    ("equation", "is_product"),
    [
        ("bhid,bhjd->bhij", True),
        ("bhij,bhjd->bhid", True),
        ("ibhd,jbhd->bhij", True),
        ("bhij,jbhd->ibhd", True),
        ("bhjd,bhid->bhij", True),  # the first operand has the columns
        ("id,dj->ij", True),
        ("bhid,jd->bhij", False),
        ("bhid,bhid->bhi", False),
        ("bid,bjd->bi", False),
        ("bid,bjdk->bij", False),
    ],
)
def test_what_is_a_product_of_matrices_is_one(equation: str, is_product: bool) -> None:
    shapes = [[SIZES[label] for label in labels] for labels in equation.partition("->")[0].split(",")]
    x, y = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes)
    model = Summed(equation)
    compiled = peftc.compile(model, "train linear", example=(x, y))
    targets = {node.target for node in compiled.graph.nodes}
    assert (aten.matmul.default in targets, aten.einsum.default in targets) == (is_product, not is_product)
    torch.testing.assert_close(compiled(x, y), model(x, y), rtol=1e-6, atol=1e-6)  # sums of seven products
