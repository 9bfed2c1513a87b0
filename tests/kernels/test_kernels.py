"""Kernels between the linear layers equal their definitions, in value and in gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernelcases import F32, F64, agree, learns, normal, rotary_arguments
from peftc.diagnostics.diagnostic import PeftcError
from peftc.kernels import (
    cross_entropy,
    gated_activation,
    rms_norm,
    rotary,
    row_lengths,
    seeded_dropout,
)
from peftc.kernels.common.activations import ACTIVATIONS

ops = torch.ops.peftc

# --- RMSNorm ---

NORMS = [(weight, first) for weight in (True, False) for first in (True, False)]


@pytest.mark.parametrize(("weighted", "cast_first"), NORMS)
@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16, torch.float16])
def test_rms_norm(weighted: bool, cast_first: bool, dtype: torch.dtype) -> None:
    x, weight = learns(2, 3, 24, dtype=dtype), learns(24, dtype=dtype) if weighted else None
    # bf16 and fp16 hold 8 and 11 bits; two roundings of products of a few units
    tolerance = {torch.bfloat16: 6e-2, torch.float16: 8e-3}.get(dtype, 1e-5)
    given = [x] if weight is None else [x, weight]
    agree(
        lambda *t: [ops.rms_norm(x, weight, 1e-6, cast_first)[0]],
        lambda *t: [rms_norm.reference(x, weight, 1e-6, cast_first)[0]],
        *given, tolerance=tolerance,
    )  # fmt: skip


def test_rms_norm_with_a_wider_weight() -> None:
    """Gemma's weight arrives in fp32 beside bf16; the result's dtype is torch's."""
    x, weight = normal(4, 16, dtype=torch.bfloat16), normal(16)
    for first in (True, False):
        ours, theirs = ops.rms_norm(x, weight, 1e-6, first)[0], rms_norm.reference(x, weight, 1e-6, first)[0]
        assert ours.dtype == theirs.dtype
        rounding = 1e-5 if first else 1e-2  # fp32, or one in the eighth bit of a bfloat16 of about 2
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=rounding)


def test_rms_norm_of_a_transposed_input() -> None:
    x = normal(6, 5, 8).transpose(0, 1).requires_grad_()
    agree(lambda x: [ops.rms_norm(x, None, 1e-6, True)[0]], lambda x: [rms_norm.reference(x, None, 1e-6, True)[0]], x)


# --- gated activation ---


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16])
def test_gated_activation(activation: str, dtype: torch.dtype) -> None:
    both = learns(3, 5, 32, dtype=dtype)
    gate, up = both.chunk(2, -1)  # a fused projection's halves are not contiguous
    agree(
        lambda _: [ops.gated_activation(gate, up, activation)],
        lambda _: [gated_activation.reference(gate, up, activation)],
        both, tolerance=5e-2 if dtype == torch.bfloat16 else 1e-5,  # two roundings to 8 bits
    )  # fmt: skip


def test_gated_activation_refuses_others() -> None:
    with pytest.raises(ValueError, match="silu"):
        ops.gated_activation(normal(2), normal(2), "swish")


# --- rotary positions ---


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16])
@given(st.integers(1, 3), st.booleans(), st.integers(1, 6), st.lists(st.integers(1, 4), min_size=1, max_size=3),
       st.integers(1, 9))  # fmt: skip
def test_rotary(dtype: torch.dtype, batch: int, alike: bool, tokens: int, heads: list[int], half: int) -> None:
    """Of any number of tensors and any layout; angles need not be the same in both halves."""
    sizes = (batch, 1 if alike else batch, tokens)
    xs, cosine, sine = rotary_arguments(sizes, tuple(heads), 2 * half, dtype)
    agree(
        lambda *xs: ops.rotary(list(xs), cosine, sine), lambda *xs: rotary.reference(xs, cosine, sine), *xs,
        tolerance=5e-2 if dtype == torch.bfloat16 else 1e-5,  # two roundings to 8 bits, of numbers up to 4
    )  # fmt: skip


def test_rotary_under_autocast_is_as_precise_as_its_angles() -> None:
    (x,), cosine, sine = rotary_arguments((2, 1, 5), (3,), 8, F32)
    narrow = x.detach().bfloat16().requires_grad_()
    agree(
        lambda x: ops.rotary([x], cosine, sine), lambda x: rotary.reference([x], cosine, sine), narrow, tolerance=2e-2
    )
    assert ops.rotary([narrow], cosine, sine)[0].dtype is F32


def test_rotary_of_which_one_result_is_not_read() -> None:
    xs, cosine, sine = rotary_arguments((2, 1, 5), (3, 2), 8, F32)
    ops.rotary(xs, cosine, sine)[1].sum().backward()
    assert xs[0].grad is None
    expected = torch.autograd.grad(rotary.reference(xs, cosine, sine)[1].sum(), xs[1])[0]
    torch.testing.assert_close(xs[1].grad, expected)


# --- lengths of rows ---


@pytest.mark.parametrize(
    ("dtype", "inner"), [(F64, F64), (F32, F64), (F32, F32), (torch.bfloat16, F32), (torch.float16, F32)]
)
@given(n_out=st.integers(1, 9), n_in=st.integers(1, 40), rank=st.integers(1, 5))
def test_row_lengths(dtype: torch.dtype, inner: torch.dtype, n_out: int, n_in: int, rank: int) -> None:
    """Of a weight that is narrower than its factors, too, whose product with A is in its own precision."""
    weight, a, b = (
        normal(*s, dtype=t) for s, t in (((n_out, n_in), dtype), ((rank, n_in), inner), ((n_out, rank), inner))
    )
    ours, theirs = ops.row_lengths(weight, a, b, 0.5, 1e-30), row_lengths.reference(weight, a, b, 0.5, 1e-30)
    assert ours.dtype is inner
    # of the square: what is added may all but cancel a row, and the product with A is rounded to 8 or 11 bits
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-5 if dtype is F32 else 1e-12)
    size = (weight.abs().to(inner) + 0.5 * b.abs() @ a.abs()).square().sum(1)
    assert ((ours.square() - theirs.square()).abs() <= rounding * size).all()


def test_a_row_of_zeros_has_the_least_length() -> None:
    weight, a, b = normal(3, 5), normal(2, 5), normal(3, 2)
    weight[1], b[1] = 0, 0
    assert ops.row_lengths(weight, a, b, 0.5, 2.0**-126)[1] == 2.0**-63


# --- seeded dropout ---


def test_bits_are_those_of_the_definition() -> None:
    for count in (1, 5, 2048, 2049, 262144 + 4097):
        for seed, salt in ((0, 0), (-5, 3), ((1 << 63) - 1, 12345)):
            pieces = [bits.clone() for *_, bits in seeded_dropout.numbers(count, seed, salt, F32)]
            assert torch.equal(torch.cat(pieces), seeded_dropout.reference_bits(count, seed, salt).float())


def test_masks_are_random() -> None:
    """Rates within five standard deviations; neighbours, other salts and other seeds are uncorrelated."""
    count, p = 1 << 20, 0.05
    kept = [(ops.seeded_dropout(torch.ones(count), torch.tensor(seed), p, salt) > 0).double()
            for seed, salt in ((1, 0), (1, 1), (2, 0), (123456789, 0))]  # fmt: skip
    deviation = math.sqrt(p * (1 - p))
    for mask in kept:
        assert abs(mask.mean() - (1 - p)) < 5 * deviation / math.sqrt(count)
        for lag in (1, 2, 3, 64, 576, 1536, 2048):
            assert _correlation(mask[:-lag], mask[lag:]) < 5 / math.sqrt(count)
    for i, mask in enumerate(kept):
        for other in kept[:i]:
            assert _correlation(mask, other) < 5 / math.sqrt(count)


def _correlation(x: Tensor, y: Tensor) -> float:
    return abs(float(torch.corrcoef(torch.stack([x, y]))[0, 1]))


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.99])
def test_seeded_dropout(dtype: torch.dtype, p: float) -> None:
    x, seed = learns(7, 300, dtype=dtype), torch.tensor(42)
    agree(
        lambda x: [ops.seeded_dropout(x, seed, p, 3)], lambda x: [seeded_dropout.reference(x, seed, p, 3)], x,
        tolerance=1e-2 if dtype.itemsize < 4 else 1e-6,
    )  # fmt: skip


def test_dropout_of_a_transposed_tensor_counts_its_elements_in_order() -> None:
    x, seed = normal(30, 40), torch.tensor(1)
    ours = ops.seeded_dropout(x.t(), seed, 0.3, 0)
    assert torch.equal(ours, ops.seeded_dropout(x.t().contiguous(), seed, 0.3, 0))
    assert ours.is_contiguous()


def test_masks_do_not_depend_on_threads_or_dtype() -> None:
    x, seed = torch.ones(513, 577), torch.tensor(9)
    before = ops.seeded_dropout(x, seed, 0.1, 2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(before, ops.seeded_dropout(x, seed, 0.1, 2))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(before > 0, ops.seeded_dropout(x.bfloat16(), seed, 0.1, 2) > 0)


# --- cross-entropy ---


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 9), vocabulary=st.integers(1, 11), chunk=st.integers(1, 10), bias=st.booleans(),
       ignored=st.sampled_from([0.0, 0.5, 1.0]))  # fmt: skip
def test_cross_entropy(count: int, vocabulary: int, chunk: int, bias: bool, ignored: float) -> None:
    hidden, weight = learns(count, 6), normal(vocabulary, 6)
    offset = normal(vocabulary, seed=2) if bias else None
    labels = torch.arange(count) * 5 % vocabulary
    labels[torch.rand(count, generator=torch.Generator().manual_seed(count)) < ignored] = -100
    arguments = (hidden, weight, offset, labels, -100, chunk)
    agree(lambda *_: [ops.cross_entropy(*arguments)[0]], lambda *_: [cross_entropy.reference(*arguments)[0]], hidden)
    assert ops.cross_entropy(*arguments)[1] == (labels != -100).sum()
    with torch.no_grad():
        torch.testing.assert_close(ops.cross_entropy(*arguments), cross_entropy.reference(*arguments))


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16, torch.float16])
def test_cross_entropy_dtypes(dtype: torch.dtype) -> None:
    hidden, weight, labels = learns(9, 16, dtype=dtype), normal(33, 16, dtype=dtype), torch.arange(9)
    arguments = (hidden, weight, None, labels, -100, 4)
    agree(
        lambda *_: [ops.cross_entropy(*arguments)[0]], lambda *_: [cross_entropy.reference(*arguments)[0]], hidden,
        tolerance={torch.bfloat16: 5e-2, torch.float16: 5e-3}.get(dtype, 1e-9),  # logits are rounded to the dtype
    )  # fmt: skip


def test_cross_entropy_of_far_apart_logits() -> None:
    """Nothing overflows, and a label as good as impossible has a finite loss."""
    hidden, weight = torch.tensor([[100.0]], requires_grad=True), torch.tensor([[-3.0], [4.0]])
    loss, _ = ops.cross_entropy(hidden, weight, None, torch.tensor([0]), -100, 1)
    assert loss.item() == 700
    assert torch.autograd.grad(loss, hidden)[0].item() == 7


def test_cross_entropy_computes_no_gradient_without_need() -> None:
    arguments = (learns(4, 6), normal(8, 6), None, torch.arange(4), -100, 2)
    counts = []
    for needed in (True, False):
        with torch.set_grad_enabled(needed), FlopCounterMode(display=False) as counter:
            ops.cross_entropy(*arguments)
        counts.append(counter.get_total_flops())
    assert counts == [4 * 4 * 6 * 8, 2 * 4 * 6 * 8]


def test_cross_entropy_of_an_unfrozen_head() -> None:
    arguments = (learns(4, 6), learns(8, 6), learns(8), torch.tensor([1, -100, 3, 2]), -100, 2)
    agree(
        lambda *_: [ops.cross_entropy(*arguments)[0]], lambda *_: [cross_entropy.reference(*arguments)[0]],
        *arguments[:3],
    )  # fmt: skip


def test_a_mean_over_no_token_is_nan_and_its_gradient_zero() -> None:
    """As torch's own: a batch whose labels are all ignored leaves the weights as they are."""
    hidden, labels = learns(4, 6), torch.full((4,), -100)
    total, count = ops.cross_entropy(hidden, normal(8, 6), None, labels, -100, 2)
    theirs = torch.nn.functional.cross_entropy(hidden @ normal(8, 6).t(), labels)
    assert (total / count).isnan()
    assert theirs.isnan()
    for loss in (total / count, theirs):
        assert torch.equal(torch.autograd.grad(loss, hidden)[0], torch.zeros(4, 6))


def test_a_second_derivative_is_refused() -> None:
    hidden, weight = learns(4, 6), learns(6)
    loss = ops.cross_entropy(ops.rms_norm(hidden, weight, 1e-6, True)[0], normal(8, 6), None, torch.arange(4), -100, 2)
    with pytest.raises(PeftcError, match="second-derivative"):
        torch.autograd.grad(loss[0], hidden, create_graph=True)
    with pytest.raises(PeftcError, match="second-derivative"):
        torch.autograd.grad(ops.rms_norm(hidden, weight, 1e-6, True)[0].sum(), hidden, create_graph=True)
