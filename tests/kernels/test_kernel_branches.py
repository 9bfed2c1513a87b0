"""Kernels of frozen layers with branches equal their definitions, in value and in gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernelcases import F32, F64, adapter_arguments, agree, branches, dora_arguments, learns, normal, scaled_arguments
from peftc.kernels import (
    adapter,
    dora_linear,
    expert_linear,
    expert_lora,
    lora_linear,
    scaled_linear,
)
from peftc.kernels.common.activations import ACTIVATIONS

ops = torch.ops.peftc

# --- LoRA ---


GROUPS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=3)


def lora_agrees(arguments: tuple[Any, ...], tolerance: float = 1e-5) -> None:
    agree(
        lambda *_: ops.lora_linear(*arguments)[:-1], lambda *_: lora_linear.reference(*arguments)[:-1],
        arguments[0], *arguments[3], *arguments[4], tolerance=tolerance,
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(sizes=GROUPS, n_in=st.integers(1, 9), lead=st.lists(st.integers(1, 4), min_size=1, max_size=2),
       transposed=st.booleans(), bias=st.booleans(), p=st.sampled_from([None, 0.0, 0.4]))  # fmt: skip
def test_lora_linear(
    sizes: list[tuple[int, int]], n_in: int, lead: list[int], transposed: bool, bias: bool, p: float | None
) -> None:
    rest = branches(n_in, sizes, transposed, bias, F32, F32)
    lora_agrees((learns(*lead, n_in), *rest, None if p is None else torch.tensor(3), p or 0.0, 1))


@pytest.mark.parametrize(
    ("dtype", "inner", "tolerance"),
    # products of a few units, rounded to 8 or 11 bits; the plain graph rounds the branch and the sum, too
    [(torch.bfloat16, torch.bfloat16, 0.15), (torch.bfloat16, F32, 0.15), (torch.float16, torch.float16, 2e-2),
     (F64, F64, 1e-12), (F32, F64, 1e-5)],
)  # fmt: skip
def test_lora_linear_dtypes(dtype: torch.dtype, inner: torch.dtype, tolerance: float) -> None:
    rest = branches(12, [(7, 2), (5, 3)], False, True, dtype, inner)
    for seed in (None, torch.tensor(3)):
        lora_agrees((learns(4, 12, dtype=dtype), *rest, seed, 0.3, 1), tolerance)


def test_lora_dropout_is_seeded_dropout() -> None:
    """The unfused graph with `seeded_dropout` in it is the oracle of the fused one."""
    x, seed = normal(4, 12), torch.tensor(11)
    weights, biases, (a,), (b,), (scale,), _ = branches(12, [(7, 2)], False, False, F32, F32)
    ours = ops.lora_linear(x, weights, biases, [a], [b], [scale], False, seed, 0.25, 8)[0]
    theirs = x @ weights[0].t() + scale * (ops.seeded_dropout(x, seed, 0.25, 8) @ a.t() @ b.t())
    torch.testing.assert_close(ours, theirs)


def test_lora_gradients_that_nobody_asks_for() -> None:
    """An unused output, a frozen A, an input without a gradient, biases and a weight that learn."""
    x = normal(4, 12)
    weights, _, a, b, scales, _ = branches(12, [(7, 2), (5, 3)], False, True, F32, F32)
    a[0].requires_grad_(False)
    biases = [learns(7), learns(5)]
    weights[1].requires_grad_()
    outputs = [
        f(x, weights, biases, a, b, scales, False, None, 0.0, 0) for f in (ops.lora_linear, lora_linear.reference)
    ]
    learned = [a[1], b[0], b[1], *biases, weights[1]]
    found = [torch.autograd.grad(y[1].square().sum(), learned, allow_unused=True, materialize_grads=True)
             for y in outputs]  # fmt: skip
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert not found[0][1].any()  # B of the output that nobody used
    assert outputs[0][-1].requires_grad is False


def test_lora_refuses_a_bias_that_learns_beside_none() -> None:
    weights, _, a, b, scales, _ = branches(12, [(7, 2), (5, 3)], False, True, F32, F32)
    with pytest.raises(NotImplementedError, match="bias at every weight"):
        ops.lora_linear(normal(4, 12), weights, [learns(7), None], a, b, scales, False, None, 0.0, 0)


def test_lora_with_strided_gradients_and_inputs() -> None:
    x = normal(12, 4, 3).transpose(0, 2).requires_grad_()
    rest = branches(12, [(7, 2)], False, False, F32, F32)
    grad, arguments = normal(7, 4, 3).transpose(0, 2), (x, *rest, None, 0.0, 0)
    found = [torch.autograd.grad(f(*arguments)[0], [x, *rest[2], *rest[3]], grad)
             for f in (ops.lora_linear, lora_linear.reference)]  # fmt: skip
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


# --- DoRA ---


@settings(max_examples=25, deadline=None)
@given(sizes=GROUPS, n_in=st.integers(1, 9), count=st.integers(1, 5), transposed=st.booleans(), bias=st.booleans(),
       p=st.sampled_from([None, 0.4]), dead=st.booleans())  # fmt: skip
def test_dora_linear(
    sizes: list[tuple[int, int]], n_in: int, count: int, transposed: bool, bias: bool, p: float | None, dead: bool
) -> None:
    arguments = dora_arguments(sizes, n_in, learns(count, n_in, dtype=F64), transposed, bias, p)
    if dead:
        with torch.no_grad():
            arguments[5][0][0] = 0
    agree(
        lambda *_: ops.dora_linear(*arguments)[:-1], lambda *_: dora_linear.reference(*arguments)[:-1],
        arguments[0], *arguments[3], *arguments[4], *arguments[5],
        tolerance=1e-8,  # what is divided by a length was multiplied by it
    )  # fmt: skip


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-5])
def test_dora_whose_bias_hides_the_output(size: float) -> None:
    """A weight and a branch next to nothing beside the bias: the gradient of the length is next to nothing, too."""
    x, weights, biases, a, b, lengths, *rest = dora_arguments([(7, 2)], 12, learns(4, 12), False, True, None)
    arguments = (x, [weights[0] * size], biases, a, [(b[0] * size).detach().requires_grad_()], lengths, *rest)
    grad = normal(*x.shape[:-1], 7)
    found, expected = (
        torch.autograd.grad(f(*arguments)[0], lengths[0], grad)[0] for f in (ops.dora_linear, dora_linear.reference)
    )
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() <= max(expected.abs().max(), 1e-5)


def test_dora_of_an_output_that_nobody_uses() -> None:
    arguments = dora_arguments([(7, 2), (5, 3)], 12, learns(4, 12), False, True, None)
    learned = [arguments[0], *arguments[3], *arguments[4], *arguments[5]]
    found = [torch.autograd.grad(f(*arguments)[1].square().sum(), learned, allow_unused=True, materialize_grads=True)
             for f in (ops.dora_linear, dora_linear.reference)]  # fmt: skip
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)  # gradients of some hundreds in fp32


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("alone", [True, False])
def test_dora_of_unfrozen_weights(transposed: bool, alone: bool) -> None:
    """What a user unfreezes behind the compiler's back, beside all that learns or by itself."""
    arguments = dora_arguments([(7, 2), (5, 3)], 12, learns(4, 12, dtype=F64), transposed, True, 0.3)
    unfrozen = [tensor.requires_grad_() for tensor in (arguments[1][1], *arguments[2])]
    learned = [arguments[0], *arguments[3], *arguments[4], *arguments[5]]
    if alone:
        learned = [tensor.requires_grad_(False) for tensor in learned]
    agree(
        lambda *_: ops.dora_linear(*arguments)[:-1], lambda *_: dora_linear.reference(*arguments)[:-1],
        *unfrozen, *learned, tolerance=1e-8,
    )  # fmt: skip


# --- IA3 ---


def scaled_agrees(arguments: Any, tolerance: float = 1e-5) -> None:
    learned = [one for one in arguments if isinstance(one, Tensor) and one.requires_grad]
    agree(lambda *_: [ops.scaled_linear(*arguments)], lambda *_: [scaled_linear.reference(*arguments)], *learned,
          tolerance=tolerance)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(n_in=st.integers(1, 9), n_out=st.integers(1, 9), lead=st.lists(st.integers(1, 4), min_size=1, max_size=2),
       transposed=st.booleans(), bias=st.booleans(), dead=st.booleans(), x_learns=st.booleans())  # fmt: skip
def test_scaled_linear(
    n_in: int, n_out: int, lead: list[int], transposed: bool, bias: bool, dead: bool, x_learns: bool
) -> None:
    x = normal(*lead, n_in).requires_grad_(x_learns)
    scaled_agrees(scaled_arguments(x, n_out, transposed, bias, dead))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # products of a few units and sums of four, rounded to 8 or 11 bits; the plain graph rounds the product, too
    [(torch.bfloat16, 0.15), (torch.float16, 2e-2), (F64, 1e-12)],
)
@pytest.mark.parametrize("dead", [False, True])
def test_scaled_linear_dtypes(dtype: torch.dtype, tolerance: float, dead: bool) -> None:
    scaled_agrees(scaled_arguments(learns(4, 12, dtype=dtype), 7, False, True, dead), tolerance)


@pytest.mark.parametrize("small", [0.0, -0.0, 1e-45, -1e-40, 1e-30, 1e-10])
def test_the_gradient_of_a_length_next_to_nothing(small: float) -> None:
    """It does not depend on the length; and the output is nothing beside one of the product's size."""
    x, weight, _, length, _ = scaled_arguments(normal(5, 12), 7, False, False)
    with torch.no_grad():
        length[0] = small
    y = ops.scaled_linear(x, weight, None, length, False)
    (found,) = torch.autograd.grad(y[:, 0].sum(), length)
    product = x @ weight[0]
    torch.testing.assert_close(found[0], product.sum(), rtol=1e-5, atol=1e-5)
    assert (y[:, 0] - small * product).abs().max() < 1e-16  # products of a few units, times 2^-63 or rounded at 1e-10


def test_scaled_linear_keeps_its_output_and_what_is_there_anyway() -> None:
    kept: list[Tensor] = []
    arguments = scaled_arguments(learns(4, 12), 7, False, True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda tensor: tensor):
        y = ops.scaled_linear(*arguments)
    there = {one.data_ptr() for one in (y, arguments[1], arguments[3])}
    assert {one.data_ptr() for one in kept} == there


@pytest.mark.parametrize("transposed", [False, True])
def test_scaled_linear_has_the_gradient_of_a_weight_that_was_unfrozen(transposed: bool) -> None:
    arguments = scaled_arguments(learns(4, 12), 7, transposed, True)
    arguments[1].requires_grad_()
    grad = normal(4, 7)
    found = [
        torch.autograd.grad(f(*arguments), arguments[:4], grad) for f in (ops.scaled_linear, scaled_linear.reference)
    ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_scaled_linear_with_strided_gradients_and_inputs() -> None:
    x = normal(12, 4, 3).transpose(0, 2).requires_grad_()
    arguments, grad = scaled_arguments(x, 7, False, True), normal(7, 4, 3).transpose(0, 2)
    learned = [x, arguments[2], arguments[3]]
    found = [torch.autograd.grad(f(*arguments), learned, grad) for f in (ops.scaled_linear, scaled_linear.reference)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


# --- adapter ---


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
def test_adapter(activation: str, bias: bool, parallel: bool) -> None:
    residual = learns(2, 4, 7) if parallel else None
    arguments = adapter_arguments(learns(2, 4, 6), residual, bias, activation, F32)
    learned = [one for one in arguments if isinstance(one, Tensor)]
    agree(lambda *_: [ops.adapter(*arguments)[0]], lambda *_: [adapter.reference(*arguments)[0]], *learned)


@pytest.mark.parametrize("inner", [torch.bfloat16, F32])
def test_adapter_dtypes(inner: torch.dtype) -> None:
    arguments = adapter_arguments(learns(4, 6, dtype=torch.bfloat16), None, True, "gelu", inner)
    learned = [one for one in arguments if isinstance(one, Tensor)]
    agree(lambda *_: [ops.adapter(*arguments)[0]], lambda *_: [adapter.reference(*arguments)[0]], *learned,
          tolerance=0.1)  # sums of a few units, rounded to 8 bits several times  # fmt: skip


def test_adapter_without_a_gradient_of_its_input() -> None:
    arguments = adapter_arguments(normal(4, 6), normal(4, 7), True, "relu", F32)
    learned = [one for one in arguments if isinstance(one, Tensor) and one.requires_grad]
    agree(lambda *_: [ops.adapter(*arguments)[0]], lambda *_: [adapter.reference(*arguments)[0]], *learned)


# --- experts ---

ENDS = st.lists(st.integers(0, 4), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(counts=ENDS, behind=st.integers(0, 2), turned=st.booleans(), frozen=st.booleans())
def test_expert_linear(counts: list[int], behind: int, turned: bool, frozen: bool) -> None:
    ends = torch.tensor(counts).cumsum(0)
    x, weight = learns(sum(counts) + behind, 5), learns(len(counts), *((7, 5) if turned else (5, 7)))
    weight.requires_grad_(not frozen)
    view = weight.transpose(1, 2) if turned else weight
    agree(lambda *_: [ops.expert_linear(x, view, ends)], lambda *_: [expert_linear.reference(x, view, ends)], x, weight)


def test_expert_linear_keeps_no_input_of_a_frozen_weight() -> None:
    kept: list[Tensor] = []
    x, weight, ends = learns(4, 5), normal(2, 5, 7), torch.tensor([1, 4])
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda tensor: tensor):
        ops.expert_linear(x, weight, ends)
    assert not any(tensor is x for tensor in kept)


@settings(max_examples=25, deadline=None)
@given(counts=ENDS, behind=st.integers(0, 2), r=st.integers(1, 3), unfrozen=st.booleans())
def test_expert_lora(counts: list[int], behind: int, r: int, unfrozen: bool) -> None:
    ends, n = torch.tensor(counts).cumsum(0), len(counts)
    weight = normal(n, 5, 7).requires_grad_(unfrozen)
    arguments = (learns(sum(counts) + behind, 5), weight, ends, learns(n, r, 5), learns(n, 7, r), 0.5)
    agree(
        lambda *_: [ops.expert_lora(*arguments)[0]], lambda *_: [expert_lora.reference(*arguments)[0]],
        arguments[0], weight, arguments[3], arguments[4],
    )  # fmt: skip


def test_expert_lora_in_bf16() -> None:
    ends, half = torch.tensor([3, 5]), torch.bfloat16
    arguments = (learns(5, 6, dtype=half), normal(2, 6, 7, dtype=half), ends, learns(2, 2, 6), learns(2, 7, 2), 0.5)
    agree(
        lambda *_: [ops.expert_lora(*arguments)[0]], lambda *_: [expert_lora.reference(*arguments)[0]],
        arguments[0], arguments[3], arguments[4], tolerance=0.15,  # as for lora_linear
    )  # fmt: skip
