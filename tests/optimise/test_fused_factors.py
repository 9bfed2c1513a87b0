"""Fusions of trained factors of a layer's outputs: they compute what they replace, or say why they do not fire."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fusioncases import Case, few, fires, misses, number, operations, sizes


@given(
    n_in=sizes, n_out=sizes, tokens=st.integers(2, 5), bias=st.booleans(), transposed=st.booleans(),
    train_bias=st.booleans(), dead=st.booleans(), times=st.integers(1, 2),
)  # fmt: skip
@settings(max_examples=15)
def test_scaled_linear(
    n_in: int, n_out: int, tokens: int, bias: bool, transposed: bool, train_bias: bool, dead: bool, times: int
) -> None:
    """One vector or several, with entries that are 0; the bias is scaled, too."""
    shapes: dict[str, tuple[int, ...]] = {"w": (n_in, n_out) if transposed else (n_out, n_in)}
    shapes |= {f"l{i}": (n_out,) for i in range(times)} | ({"c": (n_out,)} if bias else {})

    def function(case: Any, x: Tensor) -> Tensor:
        added: Any = case.c if bias else None
        y = F.linear(x, case.w, added) if not transposed else torch.addmm(added, x, case.w) if bias else x @ case.w
        return torch.as_tensor(case.l1 * (y * case.l0) if times > 1 else case.l0 * y)

    model = Case(function, **shapes)
    if dead:
        with torch.no_grad():
            model.get_parameter("l0")[0] = 0
    trained = tuple(name for name in shapes if name[0] == "l" or (name == "c" and train_bias))
    fused = fires(model, (number(tokens, n_in),), trained, dora_linear=0, scaled_linear=1)
    assert not {"aten.linear.default", "aten.addmm.default", "aten.matmul.default"} & set(operations(fused))


@given(n_in=sizes, parts=st.tuples(sizes, sizes, sizes), tokens=st.integers(2, 5), ranges=st.booleans())
@few
def test_factors_of_rows_of_a_fused_weight(n_in: int, parts: tuple[int, int, int], tokens: int, ranges: bool) -> None:
    """Those of the first and the last rows are multiplied together."""
    total, (first, middle, last) = sum(parts), parts
    index = {"k": torch.arange(first), "v": torch.arange(first + middle, total)}

    def function(case: Any, x: Tensor) -> Tensor:
        y = F.linear(x, case.w, case.c)
        for name, start, end, length in (("k", 0, first, case.l0), ("v", first + middle, total, case.l1)):
            if ranges:
                y = torch.slice_scatter(y, length * y.narrow(-1, start, end - start), -1, start, end)
            else:
                y = y.index_copy(-1, getattr(case, name), y.index_select(-1, getattr(case, name)) * length)
        return y

    model = Case(function, w=(total, n_in), c=(total,), l0=(first,), l1=(last,))
    for name, rows in index.items():
        model.register_buffer(name, rows)
    fires(model, (number(tokens, n_in),), ("l0", "l1"), scaled_rows=2, scaled_linear=1)


def test_scaled_linear_says_why_not() -> None:
    def function(case: Any, x: Tensor) -> Tensor:
        return torch.as_tensor(case.l * F.linear(x, case.w))

    shapes, x = {"w": (5, 7), "l": (5,)}, number(2, 4, 7)
    assert misses(Case(function, **shapes), (x,), ("l", "w"), "scaled_linear") == "w learns, too"
    assert misses(Case(function, **shapes), (x,), (), "scaled_linear") == "l does not learn"
    assert misses(Case(function, w=(5, 7), l=(1,)), (x,), ("l",), "scaled_linear") == "l has no entry for each row"
    assert misses(Case(function, w=(5, 7), l=(4, 1)), (x,), ("l",), "scaled_linear") == "l has no entry for each row"

    def seen(case: Any, x: Tensor) -> Tensor:
        y = F.linear(x, case.w)
        return torch.as_tensor(case.l * y + y)

    assert misses(Case(seen, **shapes), (x,), ("l",), "scaled_linear") == "linear is read by add, too"

    def shared(case: Any, x: Tensor) -> Tensor:
        return torch.cat([case.l * F.linear(x, case.w[:5]), F.linear(x, case.w[:3])], -1)

    model = Case(shared, w=(6, 7), l=(5,))
    assert misses(model, (x,), ("l",), "scaled_linear") == "the weight is read by slice_2, too"

    def wide(case: Any, x: Tensor) -> Tensor:
        return torch.as_tensor(case.l.float() * F.linear(x, case.w))

    model = Case(wide, **shapes).bfloat16()
    reason = misses(model, (x.bfloat16(),), ("l",), "scaled_linear")
    assert reason == "the product is scaled in float32"


def test_scaled_rows_says_why_not() -> None:
    def seen(case: Any, x: Tensor) -> Tensor:
        y = F.linear(x, case.w)
        part = case.l * y.narrow(-1, 1, 3)
        return torch.as_tensor(torch.slice_scatter(y, part, -1, 1, 4) * part.sum())

    shapes, x = {"w": (5, 7), "l": (3,)}, number(4, 7)
    assert misses(Case(seen, **shapes), (x,), ("l",), "scaled_rows") == "mul is read by sum_1, too"

    def gated(case: Any, x: Tensor) -> Tensor:
        y = F.linear(x, case.w)
        return torch.slice_scatter(y, F.linear(x, case.u) * y.narrow(-1, 1, 3), -1, 1, 4)

    reason = misses(Case(gated, w=(5, 7), u=(3, 7)), (x,), ("u",), "scaled_rows")
    assert reason == "linear_1 is no vector"

    def common(case: Any, x: Tensor) -> Tensor:
        y = F.linear(x, case.w)
        return torch.slice_scatter(y, case.l * y.narrow(-1, 1, 3), -1, 1, 4)

    reason = misses(Case(common, w=(5, 7), l=(1,)), (x,), ("l",), "scaled_rows")
    assert reason == "l has no entry for each row"
