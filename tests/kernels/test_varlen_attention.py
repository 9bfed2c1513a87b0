"""Attention of several texts in a row against attention under a mask of all tokens by all, made token by token."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernelcases import F32, F64, agree, normal
from peftc.bench.flops import count_flops
from peftc.kernels import varlen_attention as kernel
from peftc.kernels.gpu import varlen_attention as on_gpu

ops = torch.ops.peftc
LENGTHS = [[4, 1, 7], [6, 6], [12]]
LONG = sum(LENGTHS[0])
WINDOWS = [(True, None), (False, None), (True, 3), (True, 1)]
REST = 0.3


def positions(start: int = 0) -> Tensor:
    """Three rows; the second row's last text goes on where no text ended, by its number."""
    return torch.stack([torch.cat([torch.arange(n) + start for n in row]) for row in LENGTHS])


def mask(causal: bool, window: int | None) -> Tensor:
    """Who sees whom, by the loops of the definition."""
    seen = torch.zeros(len(LENGTHS), 1, LONG, LONG, dtype=torch.bool)
    for row, sizes in enumerate(LENGTHS):
        owner = [number for number, size in enumerate(sizes) for _ in range(size)]
        for i in range(LONG):
            for j in range(LONG):
                near = window is None or i - j < window
                seen[row, 0, i, j] = owner[i] == owner[j] and near and (j <= i or not causal)
    return seen


def operands(dtype: torch.dtype = F32, heads: int = 6, shared: int = 2, width: int = 8, out: int = 8) -> list[Tensor]:
    """As models have them: the heads of a token side by side."""
    shapes = [(heads, width), (shared, width), (shared, out)]
    made = [normal(3, LONG, *shape, dtype=dtype, seed=seed).transpose(1, 2) for seed, shape in enumerate(shapes)]
    return [item.detach().requires_grad_() for item in made]


def _given(causal: bool, window: int | None) -> tuple[Any, ...]:
    """Operands that do not learn, and what stands behind them."""
    return [item.detach() for item in operands()], (*ops.text_bounds(positions()), REST, causal, window)


def masked(causal: bool, window: int | None, *given: Any) -> list[Tensor]:
    q, k, v = given
    return [F.scaled_dot_product_attention(q, k, v, mask(causal, window), scale=REST, enable_gqa=True)]


def varlen(causal: bool, window: int | None, *given: Tensor) -> list[Tensor]:
    return [ops.varlen_attention(*given, *ops.text_bounds(positions()), REST, causal, window)[0]]


def test_bounds() -> None:
    bounds, counts = ops.text_bounds(positions())
    assert counts.tolist() == [6, 12]
    assert bounds.tolist() == [0, 4, 5, 12, 18, 24] + [36] * 31
    assert torch.equal(bounds, ops.text_bounds(positions(start=2))[0])
    gap = torch.tensor([[3, 4, 6, 7], [0, 1, 2, 3]])
    assert ops.text_bounds(gap)[0].tolist() == [0, 2, 4] + [8] * 6
    assert ops.text_bounds(torch.zeros(1, 0, dtype=torch.long))[1].tolist() == [0, 0]


@pytest.mark.parametrize(("causal", "window"), WINDOWS)
@pytest.mark.parametrize("shared", [6, 2, 1])
def test_it_is_attention_under_the_mask(causal: bool, window: int | None, shared: int) -> None:
    given = operands(shared=shared)
    # sums of at most 12 products of numbers of size 1
    agree(lambda *x: varlen(causal, window, *x), lambda *x: masked(causal, window, *x), *given, tolerance=2e-6)


@pytest.mark.parametrize(("causal", "window"), WINDOWS)
def test_the_definition_is_attention_under_the_mask(causal: bool, window: int | None) -> None:
    """Values of another width than the keys' are computed by it, on any device."""
    given = operands(F64, out=5)
    agree(lambda *x: varlen(causal, window, *x), lambda *x: masked(causal, window, *x), *given, tolerance=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_fast_and_definition_agree(window: int | None) -> None:
    given, rest = _given(True, window)
    fast, slow = ops.varlen_attention(*given, *rest), kernel.reference(*given, *rest)
    torch.testing.assert_close(fast, slow, rtol=2e-6, atol=2e-6)
    grad = normal(*fast[0].shape, seed=9)
    ours = ops.varlen_attention_backward(grad, *given, *fast, *rest)
    both: Any = (grad, *given, *slow, *rest)
    torch.testing.assert_close(ours, kernel.reference_backward(*both), rtol=1e-5, atol=5e-6)


def test_in_bfloat16() -> None:
    given = operands(torch.bfloat16)
    exact = masked(True, None, *(item.double() for item in given))[0]
    # probabilities and results of size 1 rounded to 8 bits
    torch.testing.assert_close(varlen(True, None, *given)[0].double(), exact, rtol=0, atol=2e-2)


def test_gradcheck() -> None:
    given = operands(F64, heads=2, shared=1, width=3, out=3)
    assert torch.autograd.gradcheck(lambda *x: varlen(True, 3, *x)[0], given)


@pytest.mark.slow
def test_opcheck() -> None:
    rest = (*ops.text_bounds(positions()), REST, True, None)
    torch.library.opcheck(ops.varlen_attention.default, (*operands(), *rest))
    torch.library.opcheck(ops.text_bounds.default, (positions(),))


def test_operations_are_counted_by_text() -> None:
    given = operands(heads=6, shared=2, width=8)
    pairs = sum(size * size for row in LENGTHS for size in row)
    once = 2 * 6 * 8 * pairs  # one product of queries and keys
    assert count_flops(lambda: varlen(True, None, *given)) == 2 * once
    assert count_flops(lambda: varlen(True, None, *given)[0].sum().backward()) == (2 + 5) * once


@pytest.mark.parametrize(("causal", "window"), WINDOWS)
def test_what_pytorchs_kernel_for_cuda_is_asked(causal: bool, window: int | None, monkeypatch: Any) -> None:
    """A stand-in computes what it is documented to compute of tokens side by side, bounds and sides of a window."""

    def forward(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, _: Tensor, *longest: int, **asked: Any) -> Any:
        assert longest == (12, 12)
        assert asked["enable_gqa"]
        assert ends.tolist() == [0, 4, 5, 12, 18, 24, 36]
        y, lse = torch.zeros(*q.shape[:2], v.shape[-1]), torch.zeros(q.shape[1], q.shape[0])
        left, right = asked["window_size"]
        for start, stop in pairwise(ends):
            queries, keys, values = (item[start:stop].transpose(0, 1) for item in (q, k, v))
            keys, values = (item.repeat_interleave(len(queries) // len(item), 0) for item in (keys, values))
            apart = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
            unseen = (apart > (left if left >= 0 else 99)) | (-apart > (right if right >= 0 else 99))
            scores = (queries @ keys.mT * asked["scale"]).masked_fill(unseen, -torch.inf)
            y[start:stop] = (scores.softmax(-1) @ values).transpose(0, 1)
            lse[:, start:stop] = scores.logsumexp(-1)
        return y, lse, None

    monkeypatch.setattr(torch.ops.torch_attn, "_varlen_attn", forward)
    monkeypatch.setattr(on_gpu, "_takes", lambda *_: True)
    given, rest = _given(causal, window)
    found = on_gpu.forward(*given, *rest)
    torch.testing.assert_close(found, ops.varlen_attention(*given, *rest), rtol=2e-6, atol=2e-6)


def test_pytorchs_kernels_for_cuda_are_called_as_they_are_declared(monkeypatch: Any) -> None:
    monkeypatch.setattr(on_gpu, "_takes", lambda *_: True)
    bounds, counts = ops.text_bounds(positions())
    q, k, v = (torch.empty(3, n, LONG, 8, dtype=torch.bfloat16, device="meta") for n in (6, 2, 2))
    y, lse = on_gpu.forward(q, k, v, bounds.to("meta"), counts, REST, True, None)
    assert (y.shape, lse.shape) == (q.shape, (3, 6, LONG))
    there = bounds.to("meta")
    found = on_gpu.backward(y, q, k, v, y, lse, there, counts, REST, True, None)
    assert [item.shape for item in found] == [q.shape, k.shape, v.shape]


def test_elsewhere_the_definition_runs() -> None:
    given, rest = _given(True, None)
    assert on_gpu.forward(*given, *rest) is NotImplemented
    assert on_gpu.backward(*[given[0]] * 6, *rest) is NotImplemented
