"""Fusions of norms, activations and the loss: they compute what they replace, or say why they do not fire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fusioncases import Case, few, fires, misses, number, operations, rewritten, sizes

# ---- RMSNorm ---------------------------------------------------------------------------------------------------


def _llama(case: Any, x: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    return torch.as_tensor(case.w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype))


def _gemma(case: Any, x: Tensor) -> Tensor:
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return torch.as_tensor((normal * (1.0 + case.w.float())).type_as(x))


def _t5(case: Any, x: Tensor) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return torch.as_tensor(case.w * (x * torch.rsqrt(variance + 1e-6)).to(case.w.dtype))


def _divided(case: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-3) * case.w)


def _bare(case: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3)


NORMS = [_llama, _gemma, _t5, _divided, _bare]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.__name__)
@given(batch=st.integers(2, 4), rows=sizes, width=sizes, trains=st.booleans())
@few
def test_rms_norm(norm: Any, batch: int, rows: int, width: int, trains: bool) -> None:
    model = Case(norm, w=(width,))
    trained = ("w",) if trains and norm is not _bare else ()
    fires(model, (number(batch, rows, width),), trained, rms_norm=1)


@pytest.mark.parametrize("norm", NORMS[:3], ids=lambda norm: norm.__name__)
def test_rms_norm_fires_in_half_precision(norm: Any) -> None:
    model, x = Case(norm, w=(6,)).bfloat16(), number(2, 3, 6).bfloat16()
    plain, fused, (fired,) = rewritten(model, (x,), (), ["rms_norm"])
    assert fired.count == 1
    # the plain graph rounds to 8 bits once or twice, and so does the fused one
    torch.testing.assert_close(fused(x), plain(x), rtol=2**-7, atol=2**-7)


def test_rms_norm_says_what_differs() -> None:
    def centred(case: Any, x: Tensor) -> Tensor:
        return torch.as_tensor(case.w * ((x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5)))

    assert misses(Case(centred, w=(6,)), (number(2, 3, 6),), (), "rms_norm") == (
        "sub stands where x is to be read again"
    )

    def half(case: Any, x: Tensor) -> Tensor:
        return torch.as_tensor(case.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)))

    model = Case(half, w=(6,)).bfloat16()
    reason = misses(model, (number(2, 3, 6).bfloat16(),), (), "rms_norm")
    assert reason == "it computes in bfloat16 what is given in bfloat16"

    def seen(case: Any, x: Tensor) -> Tensor:
        normal = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return torch.as_tensor(case.w * normal + normal.sin())

    fused = fires(Case(seen, w=(6,)), (number(2, 3, 6),), ("w",), rms_norm=1)  # the inner one, without the weight
    assert "aten.sin.default" in operations(fused)


# ---- Activations -----------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": lambda x: x * torch.sigmoid(x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(batch=st.integers(2, 4), rows=sizes, width=sizes, swapped=st.booleans())
@few
def test_gated_activation(name: str, batch: int, rows: int, width: int, swapped: bool) -> None:
    def function(_: Any, gate: Tensor, up: Tensor) -> Tensor:
        activated = ACTIVATIONS[name](gate)
        return up * activated if swapped else activated * up

    inputs = number(batch, rows, width), number(batch, rows, width, seed=2)
    fused = fires(Case(function), inputs, (), gated_activation=1)
    assert operations(fused) == ["peftc.gated_activation.default"]


def test_gated_activation_needs_equal_shapes_and_the_activation_for_itself() -> None:
    gate, up = number(2, 3, 5), number(2, 3, 1)
    reason = misses(Case(lambda _, a, b: F.silu(a) * b), (gate, up), (), "gated_activation")
    assert reason.startswith("what is gated is")

    def twice(_: Any, a: Tensor, b: Tensor) -> Tensor:
        activated = F.silu(a)
        return activated * b + activated

    reason = misses(Case(twice), (gate, number(2, 3, 5, seed=2)), (), "gated_activation")
    assert reason == "silu is read by add, too"


# ---- Rotary positions ------------------------------------------------------------------------------------------


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cosine + torch.cat([-x[..., half:], x[..., :half]], -1) * sine


@given(batch=st.integers(2, 4), tokens=st.integers(2, 5), heads=st.integers(2, 4), half=st.integers(1, 5))
@few
def test_rotary(batch: int, tokens: int, heads: int, half: int) -> None:
    """Queries and keys in one operation, and what is computed of a result in another."""

    def function(case: Any, q: Tensor, k: Tensor) -> Tensor:
        angle = case.angles.detach()
        cosine, sine = angle.cos(), angle.sin()
        return _turned(_turned(q, cosine, sine) + _turned(k, cosine, sine), cosine, sine)

    inputs = number(batch, heads, tokens, 2 * half), number(batch, heads, tokens, 2 * half, seed=2)
    fused = fires(Case(function, angles=(tokens, 2 * half)), inputs, (), rotary=1)
    assert operations(fused).count("peftc.rotary.default") == 2


def test_rotary_says_why_not() -> None:
    def learning(case: Any, q: Tensor) -> Tensor:
        return _turned(q, torch.cos(case.angles), torch.sin(case.angles))

    q = number(2, 3, 5, 8)
    assert misses(Case(learning, angles=(5, 8)), (q,), ("angles",), "rotary") == "cos learns"

    def unequal(case: Any, q: Tensor) -> Tensor:
        return torch.as_tensor(q * case.angles + torch.cat([-q[..., 3:], q[..., :3]], -1) * case.angles)

    reason = misses(Case(unequal, angles=(5, 8)), (q,), (), "rotary")
    assert reason.startswith("what is turned of")

    def across(case: Any, q: Tensor) -> Tensor:
        turned = torch.cat([-q[:, :, :, 4:], q[:, :, :, :4]], -2).reshape(q.shape)
        return torch.as_tensor(q * case.angles + turned * case.angles)

    assert "rotary" not in str(operations(rewritten(Case(across, angles=(5, 8)), (q,), (), ["rotary"])[1]))


# ---- Lengths of rows -------------------------------------------------------------------------------------------


def _lengths(case: Any, scale: float, square: float) -> Tensor:
    a, b = case.a.detach(), case.b.detach()
    own = torch.linalg.vector_norm(case.w, dim=1, dtype=torch.float32)
    cross = (b * F.linear(case.w, a)).sum(1)
    added = (b * (b @ (a @ a.t()))).sum(1)
    return torch.as_tensor((own * own + 2 * scale * cross + square * added).clamp_min(1e-30).sqrt())


@given(n_in=sizes, n_out=sizes, rank=st.integers(1, 4), scale=st.sampled_from([0.5, 1.0, 3.0]))
@few
def test_row_lengths(n_in: int, n_out: int, rank: int, scale: float) -> None:
    def function(case: Any, x: Tensor) -> Tensor:
        return torch.as_tensor(F.linear(x, case.a) @ case.b.t() / _lengths(case, scale, scale**2))

    model = Case(function, w=(n_out, n_in), a=(rank, n_in), b=(n_out, rank))
    fires(model, (number(3, 4, n_in),), ("a", "b"), row_lengths=1)


def test_row_lengths_says_why_not() -> None:
    shapes: Any = {"w": (5, 7), "a": (2, 7), "b": (5, 2)}
    x = number(2, 3, 5)
    model = Case(lambda case, x: x / _lengths(case, 2.0, 3.0), **shapes)
    assert misses(model, (x,), ("a", "b"), "row_lengths").startswith("its terms are scaled by 2 and by the root of 3")
    model = Case(lambda case, x: x / _lengths(case, 2.0, 4.0), **shapes)
    assert misses(model, (x,), ("a", "b", "w"), "row_lengths") == "w learns, too"


def _new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


def _bloom(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


@pytest.mark.parametrize("spelling", [_new, _bloom])
@given(rows=st.integers(2, 5), width=sizes)
@few
def test_spelt_gelu(spelling: Callable[[Tensor], Tensor], rows: int, width: int) -> None:
    fused = fires(Case(lambda _, x: spelling(x)), (number(rows, width),), (), spelt_gelu=1)
    assert operations(fused) == ["aten.gelu.default"]


def test_a_gelu_of_other_constants_is_none() -> None:
    def other(_: Any, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3.0))))

    assert misses(Case(other), (number(2, 3),), (), "spelt_gelu") == "0.8 is not 0.797885"


# ---- The loss --------------------------------------------------------------------------------------------------


@given(
    batch=st.integers(2, 3), length=st.integers(2, 5), width=sizes, vocabulary=st.integers(2, 9), bias=st.booleans(),
    scale=st.sampled_from([None, "multiplied", "divided"]), total=st.booleans(), ignored=st.booleans(),
)  # fmt: skip
@settings(max_examples=15)
def test_chunked_loss(
    batch: int, length: int, width: int, vocabulary: int, bias: bool, scale: str | None, total: bool, ignored: bool
) -> None:
    bias = bias and scale is None

    def function(case: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, case.w, case.c if bias else None)
        logits = logits * 0.25 if scale == "multiplied" else logits / 4.0 if scale == "divided" else logits
        shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        reduction = "sum" if total else "mean"
        return F.cross_entropy(logits.float().view(-1, vocabulary), shifted.view(-1), reduction=reduction)

    labels = torch.arange(batch * length).view(batch, length) % vocabulary
    if ignored:
        labels[0, 1:] = -100
    shapes = {"w": (vocabulary, width), **({"c": (vocabulary,)} if bias else {})}
    fires(Case(function, **shapes), (number(batch, length, width), labels), (), chunked_loss=1)


def test_chunked_loss_says_why_not() -> None:
    def function(case: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, case.w).view(-1, 7), labels.view(-1))

    labels = torch.arange(6).view(2, 3)
    model, hidden = Case(function, w=(7, 4)), number(2, 3, 4)
    assert misses(model, (hidden, labels), ("w",), "chunked_loss") == "the head's w learns"
    assert misses(model, (hidden[:, 0], labels[:, 0]), (), "chunked_loss") == (
        "it has one label an example, none a token"
    )

    def capped(case: Any, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = torch.tanh(F.linear(hidden, case.w) / 30.0) * 30.0
        return F.cross_entropy(logits.view(-1, 7), labels.view(-1))

    reason = misses(Case(capped, w=(7, 4)), (hidden, labels), (), "chunked_loss")
    assert reason == "tanh is tanh, not linear"
