"""Triton's kernels against their definitions: in its interpreter on CPU tensors, or on a GPU.

Run as a script with TRITON_INTERPRET=1: an access out of bounds can end the process, and once the variable is set
nothing can be compiled in it. The interpreter computes with raw bits in bf16, so only fp32 and fp16 are tried in it.
`examples/gpu.py` runs the cases on CUDA, which is torch's default device then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from kernelcases import agree_values, normal, rotary_arguments, scaled_arguments
from peftc.kernels import (
    adapter,
    dora_linear,
    gated_activation,
    lora_linear,
    rms_norm,
    rotary,
    row_lengths,
    scaled_linear,
    seeded_dropout,
)
from peftc.kernels.common.activations import ACTIVATIONS
from peftc.kernels.dequantize import dequantize_4bit, dynamic_map, levels_of
from peftc.kernels.gpu import adapter as gpu_adapter
from peftc.kernels.gpu import dequantize as gpu_dequantize
from peftc.kernels.gpu import gated_activation as gpu_gated
from peftc.kernels.gpu import lora_backward as gpu_lora_backward
from peftc.kernels.gpu import lora_linear as gpu_lora
from peftc.kernels.gpu import rms_norm as gpu_norm
from peftc.kernels.gpu import rotary as gpu_rotary
from peftc.kernels.gpu import row_lengths as gpu_lengths
from peftc.kernels.gpu import scaled_linear as gpu_scaled
from peftc.kernels.gpu import seeded_dropout as gpu_dropout

CASES: dict[str, Callable[[torch.dtype], None]] = {}


def case(function: Callable[[torch.dtype], None]) -> Callable[[torch.dtype], None]:
    """Registers a check under its name."""
    CASES[function.__name__] = function
    return function


@case
def dropout(dtype: torch.dtype) -> None:
    for seed, salt, p in ((3, 0, 0.1), (-7, 5, 0.5), ((1 << 62) + 12345, 1 << 30, 0.999)):
        for x in (normal(7, 301, dtype=dtype), normal(2049, dtype=dtype), normal(0, 3, dtype=dtype)):
            arguments = (x, torch.tensor(seed), p, salt)
            agree_values(gpu_dropout.seeded_dropout(*arguments), seeded_dropout.reference(*arguments))


@case
def norm(dtype: torch.dtype) -> None:
    for d in (2, 7, 576, 1025):
        x, weight, grad = normal(3, 2, d, dtype=dtype), normal(d, dtype=dtype), normal(3, 2, d, dtype=dtype, seed=1)
        for used, first in ((weight, True), (weight, False), (None, True)):
            ours, theirs = gpu_norm.forward(x, used, 1e-5, first), rms_norm.reference(x, used, 1e-5, first)
            agree_values(ours, theirs)
            leaf = x.clone().requires_grad_()
            learned = None if used is None else used.clone().requires_grad_()
            inputs = [leaf] if learned is None else [leaf, learned]
            slow = torch.autograd.grad(rms_norm.reference(leaf, learned, 1e-5, first)[0], inputs, grad)
            fast = [gpu_norm.backward(grad, x, used, theirs[1])]
            if used is not None:
                fast.append(gpu_norm.weight_backward(grad, x, used, theirs[1]))
            agree_values(fast, list(slow))


@case
def gated(dtype: torch.dtype) -> None:
    gate, up, grad = (normal(5, 333, dtype=dtype, seed=i).requires_grad_() for i in range(3))
    for activation in ACTIVATIONS:
        slow = gated_activation.reference(gate, up, activation)
        agree_values(gpu_gated.forward(gate.detach(), up.detach(), activation), slow.detach())
        fast = gpu_gated.backward(grad.detach(), gate.detach(), up.detach(), activation)
        agree_values(list(fast), list(torch.autograd.grad(slow, [gate, up], grad)))


@case
def turned(dtype: torch.dtype) -> None:
    """Heads in front of tokens, and behind them; widths that are no power of two."""
    for batch, angled, tokens, heads, width in ((1, 1, 1, (1,), 2), (2, 1, 70, (9, 3), 64), (3, 3, 5, (2, 1, 4), 10)):
        xs, cosine, sine = rotary_arguments((batch, angled, tokens), heads, width, dtype)
        given: Any = [x.detach() for x in xs]
        agree_values(gpu_rotary.forward(given, cosine, sine), rotary.reference(given, cosine, sine))
        slow, grads = rotary.reference(xs, cosine, sine), [normal(*x.shape, dtype=dtype, seed=3) for x in xs]
        agree_values(gpu_rotary.backward(grads, cosine, sine), list(torch.autograd.grad(slow, xs, grads)))
        behind = [x.transpose(1, 2) for x in given]
        agree_values(
            gpu_rotary.forward(behind, cosine.transpose(1, 2), sine.transpose(1, 2)),
            rotary.reference(behind, cosine.transpose(1, 2), sine.transpose(1, 2)),
        )


def branches(n_in: int, sizes: list[tuple[int, int]], transposed: bool, dtype: torch.dtype) -> Any:
    weights = [normal(*((n_in, o) if transposed else (o, n_in)), dtype=dtype, seed=i) for i, (o, _) in enumerate(sizes)]
    a = [normal(r, n_in, dtype=dtype, seed=i) for i, (_, r) in enumerate(sizes)]
    b = [normal(o, r, dtype=dtype, seed=i) for i, (o, r) in enumerate(sizes)]
    biases = [normal(o, dtype=dtype, seed=8) if i % 2 else None for i, (o, _) in enumerate(sizes)]
    return weights, biases, a, b, [0.5 + i for i in range(len(sizes))]


GROUPS = (
    [(7, 3)],
    [(130, 16)],
    [(65, 70)],
    [(7, 3), (130, 8)],
    [(33, 2), (5, 1), (129, 20)],
    [(9, 2)] * 4,
    [(9, 2)] * 5,
)


@case
def lora(dtype: torch.dtype) -> None:
    for i, sizes in enumerate(GROUPS):
        for count, n_in in ((1, 5), (37, 70), (130, 33)):
            transposed, seed = i % 2 == 1, torch.tensor(5) if i % 3 == 0 else None
            weights, biases, a, b, scales = branches(n_in, sizes, transposed, dtype)
            rest = (scales, transposed, seed, 0.4, 3)
            x = normal(count, n_in, dtype=dtype)
            arguments: Any = (x, weights, biases, a, b, *rest)
            agree_values(gpu_lora.forward(*arguments), lora_linear.reference(*arguments))
            lengths = [normal(o, dtype=dtype, seed=4) for o, _ in sizes]
            lengths[0][0] = 0
            arguments = (x, weights, [], a, b, lengths, *rest)
            agree_values(gpu_lora.dora_forward(*arguments), dora_linear.reference(*arguments))


@case
def mixed_lora(dtype: torch.dtype) -> None:
    """A and B in fp32 beside a narrower x."""
    weights, biases, _, _, scales = branches(33, [(20, 3), (9, 2)], False, dtype)
    _, _, a, b, _ = branches(33, [(20, 3), (9, 2)], False, torch.float32)
    arguments: Any = (normal(17, 33, dtype=dtype), weights, biases, a, b, scales, False, None, 0.0, 0)
    agree_values(gpu_lora.forward(*arguments), lora_linear.reference(*arguments))


@case
def lora_backward(dtype: torch.dtype) -> None:
    """All gradients, and some of them where not all are asked for and one output is not read."""
    for i, sizes in enumerate(GROUPS):
        for count, n_in in ((1, 5), (37, 70), (130, 33)):
            transposed, seed = i % 2 == 1, torch.tensor(5) if i % 3 == 0 else None
            weights, _, a, b, scales = branches(n_in, sizes, transposed, dtype)
            x, lengths = normal(count, n_in, dtype=dtype), [1 + normal(o, dtype=dtype, seed=4).abs() for o, _ in sizes]
            lengths[0][0] = 0
            biases = [normal(o, dtype=dtype, seed=8) for o, _ in sizes] if i % 2 else []
            rest: Any = (scales, transposed, seed, 0.4, 3)
            learned = [t.requires_grad_() for t in (x, *a, *b, *lengths)]
            n = len(sizes)
            for missing in (None, n - 1) if n > 1 else (None,):
                needs = [missing is None, *([True, missing is None] * (3 * n))[: 3 * n]]
                for dora in (False, True):
                    wanted = learned if dora else learned[: 1 + 2 * n]
                    needed = needs[: len(wanted)]
                    *outputs, hidden = (
                        dora_linear.reference(x, weights, biases, a, b, lengths, *rest) if dora
                        else lora_linear.reference(x, weights, [], a, b, *rest)
                    )  # fmt: skip
                    grads: Any = [normal(*y.shape, dtype=dtype, seed=6 + j) for j, y in enumerate(outputs)]
                    read = [j for j in range(n) if j != missing]
                    slow = torch.autograd.grad(
                        [outputs[j] for j in read], wanted, [grads[j] for j in read], retain_graph=True,
                        materialize_grads=True,
                    )  # fmt: skip
                    given = [grads[j] if j in read else None for j in range(n)]
                    plain: Any = (given, x, hidden, weights, a, b, *rest, needed)
                    scaled: Any = (given, x, outputs, hidden, weights, biases, a, b, lengths, *rest, needed)
                    with torch.no_grad():
                        ours = gpu_lora_backward
                        fast = ours.dora_backward(*scaled) if dora else ours.backward(*plain)
                    expected = [gradient for gradient, need in zip(slow, needed, strict=True) if need]
                    if dora and needed[1 + 2 * n]:  # the gradient of a length that is 0 is not read off
                        place = sum(needed[: 1 + 2 * n])
                        expected[place] = expected[place].clone()
                        expected[place][0] = 0
                    agree_values(fast, expected)


@case
def mixed_lora_backward(dtype: torch.dtype) -> None:
    """A and B in fp32 beside a narrower x."""
    weights, _, _, _, scales = branches(33, [(20, 3), (9, 2)], False, dtype)
    _, _, a, b, _ = branches(33, [(20, 3), (9, 2)], False, torch.float32)
    x = normal(17, 33, dtype=dtype)
    *outputs, hidden = lora_linear.reference(x, weights, [], a, b, scales, False, None, 0.0, 0)
    grads: Any = [normal(*y.shape, dtype=dtype, seed=6) for y in outputs]
    arguments: Any = (grads, x, hidden, weights, a, b, scales, False, None, 0.0, 0, [True] * 5)
    agree_values(gpu_lora_backward.backward(*arguments), lora_linear.backward(*arguments))


@case
def lengths_of_rows(dtype: torch.dtype) -> None:
    """Of factors as narrow as the weight, and wider ones; the first row is cancelled out."""
    for n_out, n_in, rank in ((1, 5, 1), (37, 300, 16), (130, 33, 70)):
        for inner in (dtype, torch.float32):
            weight, b = normal(n_out, n_in, dtype=dtype), normal(n_out, rank, dtype=inner)
            weight[0], b[0] = 0, 0
            arguments: Any = (weight, normal(rank, n_in, dtype=inner), b, 0.3, 2.0**-12)
            agree_values(gpu_lengths.forward(*arguments), row_lengths.reference(*arguments))


@case
def scaled(dtype: torch.dtype) -> None:
    for count, n_in, n_out, transposed in ((1, 5, 7, False), (37, 70, 130, True), (130, 33, 1, False)):
        for bias in (False, True):
            given = scaled_arguments(normal(count, n_in, dtype=dtype), n_out, transposed, bias, dead=n_out > 1)
            arguments: Any = [one.detach() if isinstance(one, torch.Tensor) else one for one in given]
            agree_values(gpu_scaled.forward(*arguments), scaled_linear.reference(*arguments))


@case
def lora_input_gradient(dtype: torch.dtype) -> None:
    for count, n_in, r in ((3, 5, 2), (70, 130, 16), (17, 65, 70)):
        dx, dhidden, a = normal(count, n_in, dtype=dtype), normal(count, r, dtype=dtype), normal(r, n_in, dtype=dtype)
        seed = torch.tensor(9)
        theirs = dx + seeded_dropout.reference(dhidden @ a, seed, 0.3, 2)
        agree_values(gpu_lora_backward.add_input_gradient_(dx.clone(), dhidden, a, seed, 0.3, 2), theirs)


@case
def bottleneck(dtype: torch.dtype) -> None:
    for count, n_in, width, n_out in ((1, 5, 3, 5), (37, 70, 48, 70), (33, 20, 128, 65)):
        for parallel in (False, True):
            residual = normal(count, n_out, dtype=dtype, seed=3) if parallel or n_in != n_out else None
            biases = (normal(width, dtype=dtype), normal(n_out, dtype=dtype)) if parallel else (None, None)
            x, down, up = (normal(*shape, dtype=dtype) for shape in ((count, n_in), (width, n_in), (n_out, width)))
            arguments: Any = (x, residual, down, biases[0], up, biases[1], 0.7, "gelu")
            agree_values(list(gpu_adapter.forward(*arguments)), list(adapter.reference(*arguments)))


@case
def four_bits(dtype: torch.dtype) -> None:
    """Bit for bit what the operation makes on the CPU."""
    device = torch.get_default_device()
    tables = levels_of("nf4", device), dynamic_map(device)
    for count, block in ((128, 64), (4097, 64), (40000, 128), (2, 64)):
        blocks = -(-count // block)
        packed = torch.randint(256, (-(-count // 2), 1), dtype=torch.uint8)
        coded, nested = torch.randint(256, (blocks,), dtype=torch.uint8), normal(-(-blocks // 256)).abs()
        cases = ((normal(blocks).abs(), None, None), (coded, nested, torch.tensor(0.25)))
        for absmax, outer, offset in cases:
            arguments = packed, absmax, outer, offset
            ours = gpu_dequantize.dequantize_4bit(*arguments, *tables, block, (count,), dtype)
            there: list[Any] = [one if one is None else one.cpu() for one in arguments]
            rest: Any = ("nf4", block, (count,), dtype)
            assert torch.equal(ours.cpu(), dequantize_4bit(*there, *rest))


if __name__ == "__main__":
    torch.manual_seed(0)
    for check in CASES.values():
        check(getattr(torch, sys.argv[1]))
