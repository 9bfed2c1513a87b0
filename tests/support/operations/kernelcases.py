"""What the kernels' tests share: numbers, comparison of an operation with its definition, arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

F32, F64 = torch.float32, torch.float64


ops = torch.ops.peftc


def normal(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    """The same numbers on every device; they lie on torch's default device."""
    generator = torch.Generator("cpu").manual_seed(sum(shape) + 1000 * seed)
    drawn = torch.randn(shape, generator=generator, dtype=F64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


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


def branches(
    n_in: int, sizes: list[tuple[int, int]], transposed: bool, bias: bool, dtype: torch.dtype, inner: Any
) -> Any:
    """Arguments of `lora_linear` but x: a frozen weight and a trained pair for each (n_out, rank)."""
    weights = [normal(*((n_in, o) if transposed else (o, n_in)), dtype=dtype, seed=i) for i, (o, _) in enumerate(sizes)]
    biases = [normal(o, dtype=dtype, seed=5) if bias else None for o, _ in sizes]
    a = [learns(r, n_in, dtype=inner, seed=i) for i, (_, r) in enumerate(sizes)]
    b = [learns(o, r, dtype=inner, seed=i) for i, (o, r) in enumerate(sizes)]
    return weights, biases, a, b, [0.5 + i for i in range(len(sizes))], transposed


def dora_arguments(
    sizes: list[tuple[int, int]], n_in: int, x: Tensor, transposed: bool, bias: bool, p: float | None
) -> Any:
    weights, biases, a, b, scales, _ = branches(n_in, sizes, transposed, bias, x.dtype, x.dtype)
    lengths = [learns(o, dtype=x.dtype, seed=9) for o, _ in sizes]
    return x, weights, biases, a, b, lengths, scales, transposed, None if p is None else torch.tensor(3), p or 0.0, 1


def scaled_arguments(x: Tensor, n_out: int, transposed: bool, bias: bool, dead: bool = False) -> Any:
    """Arguments of `scaled_linear`; `dead`: the first length is 0."""
    n_in, dtype = x.shape[-1], x.dtype
    length = normal(n_out, dtype=dtype, seed=9)
    length[0] = 0 if dead else length[0]
    weight = normal(*((n_in, n_out) if transposed else (n_out, n_in)), dtype=dtype)
    return x, weight, learns(n_out, dtype=dtype, seed=5) if bias else None, length.requires_grad_(), transposed


def adapter_arguments(x: Tensor, residual: Tensor | None, bias: bool, activation: str, dtype: torch.dtype) -> Any:
    width = x.shape[-1] if residual is None else residual.shape[-1]
    biases = [learns(3, dtype=dtype), learns(width, dtype=dtype)] if bias else [None, None]
    return (x, residual, learns(3, x.shape[-1], dtype=dtype), biases[0], learns(width, 3, dtype=dtype), biases[1], 0.7,
            activation)  # fmt: skip


def rotary_arguments(sizes: tuple[int, int, int], heads: tuple[int, ...], width: int, dtype: torch.dtype) -> Any:
    """Heads that lie side by side for each token, as projections leave them, and others that do not."""
    batch, angled, tokens = sizes
    xs = [
        normal(batch, tokens, count, width, dtype=dtype, seed=count).transpose(1, 2) if place % 2 == 0
        else normal(batch, count, tokens, width, dtype=dtype, seed=count)
        for place, count in enumerate(heads)
    ]  # fmt: skip
    cosine, sine = (normal(angled, 1, tokens, width, dtype=dtype, seed=20 + i) for i in range(2))
    return [x.requires_grad_() for x in xs], cosine, sine


def agree_values(ours: Tensor | Sequence[Tensor], theirs: Tensor | Sequence[Tensor]) -> None:
    """To what sums of a few hundred products of the dtype allow, relative to the largest number."""
    for mine, right in zip(_tensors(ours), _tensors(theirs), strict=True):
        assert mine.shape == right.shape
        assert mine.dtype == right.dtype
        largest = float(right.abs().max()) if right.numel() else 1.0
        tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(mine.dtype, 1e-5)
        torch.testing.assert_close(mine, right, rtol=0, atol=tolerance * max(largest, 1e-3))


def _tensors(values: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else list(values)


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
        "rotary": (ops.rotary, rotary_arguments((2, 1, 5), (4, 2), 8, dtype)),
        "row_lengths": (
            ops.row_lengths,
            (learns(7, 5, dtype=dtype), learns(2, 5, dtype=dtype), learns(7, 2, dtype=dtype), 0.5, 1e-30),
        ),
        "seeded_dropout": (ops.seeded_dropout, (learns(2, 3, 8, dtype=dtype), seed, 0.3, 1)),
        "lora_linear": (ops.lora_linear, _lora_arguments(dtype=dtype)),
        "lora_linear_dropout": (ops.lora_linear, _lora_arguments(seed, dtype)),
        "dora_linear": (
            ops.dora_linear, dora_arguments([(7, 2), (5, 3)], 12, learns(2, 3, 12, dtype=dtype), False, True, 0.3),
        ),
        "scaled_linear": (ops.scaled_linear, scaled_arguments(learns(2, 3, 12, dtype=dtype), 7, False, True, True)),
        "adapter": (ops.adapter, adapter_arguments(learns(2, 3, 8, dtype=dtype), None, True, "silu", dtype)),
        "expert_linear": (
            ops.expert_linear, (learns(6, 8, dtype=dtype), learns(2, 8, 5, dtype=dtype), torch.tensor([2, 5])),
        ),
        "expert_lora": (
            ops.expert_lora, (learns(6, 8, dtype=dtype), normal(2, 8, 5, dtype=dtype), torch.tensor([2, 5]),
                              learns(2, 3, 8, dtype=dtype), learns(2, 5, 3, dtype=dtype), 0.5),
        ),
        "cross_entropy": (
            ops.cross_entropy, (learns(6, 8, dtype=dtype), normal(11, 8, dtype=dtype), None, torch.arange(6), -100, 4),
        ),
    }  # fmt: skip
