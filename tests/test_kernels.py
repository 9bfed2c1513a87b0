"""Every kernel equals its definition, in value and in gradient, and is an operation that torch's compilers accept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import peftc.kernels  # noqa: F401
from peftc.kernels import cross_entropy, gated_activation, lora_linear, rms_norm, seeded_dropout

ops = torch.ops.peftc
F32, F64 = torch.float32, torch.float64


def normal(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 1000 * seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Of a sum that weighs every output's elements differently."""
    loss = sum((output * normal(*output.shape, dtype=output.dtype, seed=7)).sum() for output in outputs)
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, inputs))


def agree(
    fast: Callable[..., list[Tensor]], slow: Callable[..., list[Tensor]], *inputs: Tensor, tolerance: float = 1e-5
) -> None:
    """Same values, same gradients of the inputs that are leaves with gradients."""
    learned = [tensor for tensor in inputs if tensor.requires_grad]
    ours, theirs = fast(*inputs), slow(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradients(ours, learned), gradients(theirs, learned), rtol=tolerance, atol=tolerance)


def learns(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return normal(*shape, dtype=dtype, seed=seed).requires_grad_()


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
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-2 if not first else 1e-5)


def test_rms_norm_of_a_transposed_input() -> None:
    x = normal(6, 5, 8).transpose(0, 1).requires_grad_()
    agree(lambda x: [ops.rms_norm(x, None, 1e-6, True)[0]], lambda x: [rms_norm.reference(x, None, 1e-6, True)[0]], x)


# --- gated activation ---


@pytest.mark.parametrize("activation", gated_activation.ACTIVATIONS)
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
        ops.gated_activation(normal(2), normal(2), "tanh")


# --- seeded dropout ---


def test_bits_are_those_of_the_definition() -> None:
    for count in (1, 5, 2048, 2049, 131072 + 4097):
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


# --- LoRA ---


def branches(
    n_in: int, sizes: list[tuple[int, int]], transposed: bool, bias: bool, dtype: torch.dtype, inner: Any
) -> Any:
    """Arguments of `lora_linear` but x: a frozen weight and a trained pair for each (n_out, rank)."""
    weights = [normal(*((n_in, o) if transposed else (o, n_in)), dtype=dtype, seed=i) for i, (o, _) in enumerate(sizes)]
    biases = [normal(o, dtype=dtype, seed=5) if bias else None for o, _ in sizes]
    a = [learns(r, n_in, dtype=inner, seed=i) for i, (_, r) in enumerate(sizes)]
    b = [learns(o, r, dtype=inner, seed=i) for i, (o, r) in enumerate(sizes)]
    return weights, biases, a, b, [0.5 + i for i in range(len(sizes))], transposed


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
    with pytest.raises(NotImplementedError, match="frozen"):
        ops.cross_entropy(normal(4, 6), learns(8, 6), None, torch.arange(4), -100, 2)


# --- what torch asks of an operation ---


def _lora_arguments(seed: Tensor | None = None, dtype: torch.dtype = F32) -> tuple[Any, ...]:
    rest = branches(12, [(7, 2), (5, 3)], False, True, dtype, dtype)
    return (learns(2, 3, 12, dtype=dtype), *rest, seed, 0.3 if seed is not None else 0.0, 4)


def subjects(dtype: torch.dtype) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Operation and example arguments, by name."""
    seed = torch.tensor(5)
    return {
        "rms_norm": (ops.rms_norm, (learns(2, 3, 8, dtype=dtype), learns(8, dtype=dtype), 1e-6, True)),
        "gated_activation": (
            ops.gated_activation, (learns(2, 3, 8, dtype=dtype), learns(2, 3, 8, dtype=dtype, seed=1), "silu"),
        ),
        "seeded_dropout": (ops.seeded_dropout, (learns(2, 3, 8, dtype=dtype), seed, 0.3, 1)),
        "lora_linear": (ops.lora_linear, _lora_arguments(dtype=dtype)),
        "lora_linear_dropout": (ops.lora_linear, _lora_arguments(seed, dtype)),
        "cross_entropy": (
            ops.cross_entropy, (learns(6, 8, dtype=dtype), normal(11, 8, dtype=dtype), None, torch.arange(6), -100, 4),
        ),
    }  # fmt: skip


SUBJECTS = list(subjects(F32))


@pytest.mark.parametrize("name", SUBJECTS)
def test_opcheck(name: str) -> None:
    op, arguments = subjects(F32)[name]
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("name", SUBJECTS)
def test_gradcheck(name: str) -> None:
    op, arguments = subjects(F64)[name]
    flat, spec = torch.utils._pytree.tree_flatten(arguments)
    places = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) and leaf.requires_grad]

    def run(*learned: Tensor) -> Any:
        values = list(flat)
        for i, tensor in zip(places, learned, strict=True):
            values[i] = tensor
        result = op(*torch.utils._pytree.tree_unflatten(values, spec))
        outputs = [result] if isinstance(result, Tensor) else list(result)
        return tuple(output for output in outputs if output.requires_grad)

    assert torch.autograd.gradcheck(run, tuple(flat[i] for i in places))


class Wrapper(nn.Module):
    """One operation on an input of dynamic size; everything else is a buffer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.op, (_, *rest) = subjects(F32)[name]
        self.name = name
        flat, spec = torch.utils._pytree.tree_flatten(rest)
        flat = [
            nn.Parameter(leaf.detach()) if isinstance(leaf, Tensor) and leaf.requires_grad else leaf for leaf in flat
        ]
        self.learned = nn.ParameterList(leaf for leaf in flat if isinstance(leaf, nn.Parameter))
        self.rest = torch.utils._pytree.tree_unflatten(flat, spec)

    def forward(self, x: Tensor) -> Any:
        if self.name == "gated_activation":
            return self.op(x, x * 2, *self.rest[1:])
        if self.name == "cross_entropy":
            return self.op(x, self.rest[0], None, torch.zeros_like(x[:, 0], dtype=torch.int64), *self.rest[3:])
        return self.op(x, *self.rest)


def _sizes(name: str) -> tuple[Tensor, Tensor]:
    width = subjects(F32)[name][1][0].shape[-1]
    shapes = [(6, width), (5, width)] if name == "cross_entropy" else [(2, 3, width), (4, 5, width)]
    return learns(*shapes[0]), learns(*shapes[1])


@pytest.mark.parametrize("name", SUBJECTS)
def test_export_with_dynamic_sizes(name: str) -> None:
    small, large = _sizes(name)
    module = Wrapper(name)
    dynamic = dict.fromkeys(range(small.dim() - 1), torch.export.Dim.DYNAMIC)
    program = torch.export.export(module, (small.detach(),), dynamic_shapes=(dynamic,), strict=False)
    torch.testing.assert_close(program.module(check_guards=False)(large.detach()), module(large.detach()))


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_compile_as_one_graph(name: str) -> None:
    module = Wrapper(name)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in _sizes(name):
        outputs = [f(x) for f in (compiled, module)]
        lists = [[o] if isinstance(o, Tensor) else [t for t in o if t.requires_grad] for o in outputs]
        torch.testing.assert_close(lists[0], lists[1])
        torch.testing.assert_close(gradients(lists[0], [x]), gradients(lists[1], [x]))


def test_flops() -> None:
    """A LoRA linear costs its base's products and 6 m r (n_in + n_out)."""
    x = learns(10, 12)
    rest = branches(12, [(7, 2)], False, False, F32, F32)
    with FlopCounterMode(display=False) as counter:
        ops.lora_linear(x, *rest, None, 0.0, 0)[0].sum().backward()
    assert counter.get_total_flops() == 4 * 10 * 12 * 7 + 6 * 10 * 2 * (12 + 7)


def test_no_rows() -> None:
    x = learns(0, 12)
    rest = branches(12, [(7, 2)], False, False, F32, F32)
    assert ops.lora_linear(x, *rest, torch.tensor(1), 0.5, 0)[0].shape == (0, 7)
    assert ops.rms_norm(x, None, 1e-6, True)[0].shape == (0, 12)
    assert ops.seeded_dropout(x, torch.tensor(1), 0.5, 0).shape == (0, 12)
