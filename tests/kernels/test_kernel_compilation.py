"""Triton's kernels without a GPU: right in the interpreter, and compiled without spills for each kind of device."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton import language as tl

from compiled import SHARED, Launch, launches, shared, spilled
from paths import OPERATIONS, ROOT
from peftc.kernels.common.activations import ACTIVATIONS
from peftc.kernels.gpu import (
    adapter,
    dequantize,
    gated_activation,
    lora_backward,
    lora_linear,
    rms_norm,
    rotary,
    row_lengths,
    scaled_linear,
    seeded_dropout,
)

F32 = torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_interpreted_kernels_equal_their_definitions(dtype: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{OPERATIONS}"}
    command = [sys.executable, str(OPERATIONS / "interpreted.py"), dtype]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _lora(
    dtype: torch.dtype, inner: torch.dtype, sizes: list[int], rank: int, transposed: bool, drop: bool,
    count: int = 256,
) -> Any:  # fmt: skip
    x = empty(count, 576, dtype=dtype)
    weights = [empty(576, n, dtype=dtype) if transposed else empty(n, 576, dtype=dtype) for n in sizes]
    a, b = [empty(rank, 576, dtype=inner) for _ in sizes], [empty(n, rank, dtype=inner) for n in sizes]
    biases = [empty(n, dtype=dtype) for n in sizes] if transposed else []
    seed = torch.tensor(1) if drop else None
    return x, weights, biases, a, b, [2.0] * len(sizes), transposed, seed, 0.1, 0


def _dora(dtype: torch.dtype) -> Any:
    x, weights, biases, a, b, *rest = _lora(dtype, dtype, [1536, 1536], 16, False, True)
    arguments: Any = (x, weights, biases, a, b, [empty(1536, dtype=dtype)] * 2, *rest)
    return lora_linear.dora_forward(*arguments)


def _backward(arguments: Any) -> Any:
    x, weights, _, a, b, *rest = arguments
    hidden = empty(x.shape[0], sum(A.shape[0] for A in a), dtype=a[0].dtype)
    grads = [empty(x.shape[0], B.shape[0], dtype=x.dtype) for B in b]
    given: Any = (grads, x, hidden, weights, a, b, *rest, [True] * (1 + 2 * len(a)))
    return lora_backward.backward(*given)


def _dora_backward(dtype: torch.dtype) -> Any:
    x, weights, _, a, b, *rest = _lora(dtype, dtype, [1536, 1536], 16, False, True)
    hidden, wide = empty(x.shape[0], 32, dtype=dtype), [empty(x.shape[0], 1536, dtype=dtype)] * 2
    d = [empty(1536, dtype=dtype)] * 2
    given: Any = (wide, x, wide, hidden, weights, [d[0], None], a, b, d, *rest, [True] * 7)
    return lora_backward.dora_backward(*given)


def _four_bits(dtype: torch.dtype, double: bool) -> Any:
    packed, absmax = empty(576 * 288, 1, dtype=torch.uint8), empty(576 * 9, dtype=torch.uint8 if double else F32)
    nested, offset = (empty(21, dtype=F32), empty(dtype=F32)) if double else (None, None)
    tables = empty(16, dtype=F32), empty(256, dtype=F32)
    return dequantize.dequantize_4bit(packed, absmax, nested, offset, *tables, 64, (576, 576), dtype)


def subjects(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """What is launched for operands of `dtype`, by name."""
    x, wide, d = empty(256, 576, dtype=dtype), empty(256, 4096, dtype=dtype), empty(576, dtype=dtype)
    rstd, seed = torch.empty(256, 1), torch.tensor(1)
    down, up = empty(48, 576, dtype=dtype), empty(576, 48, dtype=dtype)
    heads = empty(2, 128, 8, 128, dtype=dtype).transpose(1, 2)
    result: dict[str, Callable[[], Any]] = {
        "dropout": lambda: seeded_dropout.seeded_dropout(x, seed, 0.1, 1),
        "norm": lambda: rms_norm.forward(x, d, 1e-5, True),
        "norm 4096": lambda: rms_norm.forward(wide, None, 1e-5, False),
        "norm backward": lambda: rms_norm.backward(x, x, d, rstd),
        "norm 4096 backward": lambda: rms_norm.backward(wide, wide, None, rstd),
        "norm weight backward": lambda: rms_norm.weight_backward(x, x, d, rstd),
        "rotary": lambda: rotary.forward([heads, heads[:, :2]], heads[:1, :1], heads[:1, :1]),
        "rotary backward": lambda: rotary.backward([heads, heads[:, :2]], heads[:1, :1], heads[:1, :1]),
        "lengths": lambda: row_lengths.forward(
            wide, empty(16, 4096, dtype=dtype), empty(256, 16, dtype=dtype), 2.0, 0.0
        ),
        "lengths in fp32": lambda: row_lengths.forward(
            wide, empty(256, 4096, dtype=F32), empty(256, 256, dtype=F32), 2.0, 0.0
        ),
        "lora": lambda: lora_linear.forward(*_lora(dtype, dtype, [1536], 16, False, False)),
        "lora group": lambda: lora_linear.forward(*_lora(dtype, dtype, [576, 192, 192], 16, False, True)),
        "lora group of four": lambda: lora_linear.forward(*_lora(dtype, dtype, [576] * 4, 8, True, False)),
        "lora r 256": lambda: lora_linear.forward(*_lora(dtype, dtype, [1536], 256, False, False)),
        "lora in fp32": lambda: lora_linear.forward(*_lora(dtype, torch.float32, [1536], 16, False, False)),
        "dora": lambda: _dora(dtype),
        "scaled": lambda: scaled_linear.forward(x, down.t(), None, down[:, 0], True),
        "scaled, with a bias": lambda: scaled_linear.forward(x, empty(1536, 576, dtype=dtype), wide[0], wide[0], False),
        "scaled, of one token": lambda: scaled_linear.forward(x[:1], down, None, down[:, 0], False),
        "lora of one token": lambda: lora_linear.forward(*_lora(dtype, dtype, [1536], 16, False, False, 1)),
        "lora r 1": lambda: lora_linear.forward(*_lora(dtype, dtype, [1536, 1], 1, False, True)),
        "lora of 30 tokens": lambda: lora_linear.forward(*_lora(dtype, dtype, [1536], 16, False, False, 30)),
        "lora of 64 tokens": lambda: lora_linear.forward(*_lora(dtype, dtype, [1536], 16, False, False, 64)),
        "lora backward": lambda: _backward(_lora(dtype, dtype, [576, 192, 192], 16, False, False)),
        "lora backward in fp32": lambda: _backward(_lora(dtype, F32, [1536], 16, False, True)),
        "lora backward r 256": lambda: _backward(_lora(dtype, dtype, [1536], 256, False, False)),
        "dora backward": lambda: _dora_backward(dtype),
        "lora input gradient": lambda: lora_backward.add_input_gradient_(
            x, empty(256, 48, dtype=dtype), down, seed, 0.1, 0
        ),
        "adapter": lambda: adapter.forward(x, None, down, None, up, None, 1.0, "relu"),
        "wide adapter": lambda: adapter.forward(
            x, x, empty(128, 576, dtype=dtype), empty(128, dtype=dtype), empty(576, 128, dtype=dtype), d, 4.0, "gelu"
        ),
    }  # fmt: skip
    for activation in ACTIVATIONS:
        result[activation] = partial(gated_activation.forward, x, x, activation)
        result[f"{activation} backward"] = partial(gated_activation.backward, x, x, x, activation)
    result |= {"nf4": partial(_four_bits, dtype, False), "nf4 double": partial(_four_bits, dtype, True)}
    return result


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)  # fp16 is multiplied as bf16 is
def test_no_kernel_spills(target: str, dtype: torch.dtype) -> None:
    for name, subject in subjects(dtype).items():
        for launch in launches(target, subject):
            kernel = launch.build(target)
            assert spilled(kernel, target) == 0, (name, launch.options)
            assert shared(kernel) <= SHARED[target], (name, launch.options)


@triton.jit  # type: ignore[untyped-decorator]
def _product(x, w, y, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        left = tl.load(x + row[:, None] * depth + start + k[None, :])
        total = tl.dot(left, tl.load(w + (start + k)[:, None] * COLUMNS + column[None, :]), total)
    tl.store(y + row[:, None] * COLUMNS + column[None, :], total)


def test_a_product_of_too_much_spills() -> None:
    """The control: what the test above looks for is found where it is."""
    half = empty(16, dtype=torch.float16)
    sizes = {"ROWS": 128, "COLUMNS": 256, "DEPTH": 64}
    given = {"x": half, "w": half, "y": torch.empty(16), "depth": 4096} | sizes
    for target in ("sm_80", "sm_90"):
        kernel = Launch(_product, given, {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}).build(target)
        assert spilled(kernel, target) > 0


@pytest.mark.slow
def test_kernels_on_the_cpu_do_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch, peftc.kernels;"
        "torch.ops.peftc.rms_norm(torch.ones(2, 3, requires_grad=True), None, 1e-6, True)[0].sum().backward()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
