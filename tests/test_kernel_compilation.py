"""Triton's kernels without a GPU: right in the interpreter, and compiled without spills for each kind of device."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton import language as tl

from compiled import SHARED, Launch, launches, shared, spilled
from peftc.kernels.activations import ACTIVATIONS
from peftc.kernels.gpu import adapter, dequantize, gated_activation, lora_linear, rms_norm, seeded_dropout

TESTS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_interpreted_kernels_equal_their_definitions(dtype: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    command = [sys.executable, str(TESTS / "interpreted.py"), dtype]
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


def subjects(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """What is launched for operands of `dtype`, by name."""
    x, wide, d = empty(256, 576, dtype=dtype), empty(256, 4096, dtype=dtype), empty(576, dtype=dtype)
    rstd, seed = torch.empty(256, 1), torch.tensor(1)
    down, up = empty(48, 576, dtype=dtype), empty(576, 48, dtype=dtype)
    result: dict[str, Callable[[], Any]] = {
        "dropout": lambda: seeded_dropout.seeded_dropout(x, seed, 0.1, 1),
        "norm": lambda: rms_norm.forward(x, d, 1e-5, True),
        "norm 4096": lambda: rms_norm.forward(wide, None, 1e-5, False),
        "norm backward": lambda: rms_norm.backward(x, x, d, rstd),
        "norm 4096 backward": lambda: rms_norm.backward(wide, wide, None, rstd),
        "norm weight backward": lambda: rms_norm.weight_backward(x, x, d, rstd),
        "lora": lambda: lora_linear.forward(*_lora(dtype, dtype, [1536], 16, False, False)),
        "lora group": lambda: lora_linear.forward(*_lora(dtype, dtype, [576, 192, 192], 16, False, True)),
        "lora group of four": lambda: lora_linear.forward(*_lora(dtype, dtype, [576] * 4, 8, True, False)),
        "lora r 256": lambda: lora_linear.forward(*_lora(dtype, dtype, [1536], 256, False, False)),
        "lora in fp32": lambda: lora_linear.forward(*_lora(dtype, torch.float32, [1536], 16, False, False)),
        "dora": lambda: lora_linear.dora_forward(
            *(given := _lora(dtype, dtype, [1536, 1536], 16, False, True))[:5],
            [empty(1536, dtype=dtype)] * 2, *given[5:],
        ),
        "lora of one token": lambda: lora_linear.forward(*_lora(dtype, dtype, [1536], 16, False, False, 1)),
        "lora r 1": lambda: lora_linear.forward(*_lora(dtype, dtype, [1536, 1], 1, False, True)),
        "lora of 30 tokens": lambda: lora_linear.forward(*_lora(dtype, dtype, [1536], 16, False, False, 30)),
        "lora of 64 tokens": lambda: lora_linear.forward(*_lora(dtype, dtype, [1536], 16, False, False, 64)),
        "lora input gradient": lambda: lora_linear.add_input_gradient_(
            x, empty(256, 48, dtype=dtype), down, seed, 0.1, 0
        ),
        "adapter": lambda: adapter.forward(x, None, down, None, up, None, 1.0, "relu"),
        "wide adapter": lambda: adapter.forward(
            x, x, empty(128, 576, dtype=dtype), empty(128, dtype=dtype), empty(576, 128, dtype=dtype), d, 4.0, "gelu"
        ),
    }  # fmt: skip
    for activation in ACTIVATIONS:
        result[activation] = lambda activation=activation: gated_activation.forward(x, x, activation)
        result[f"{activation} backward"] = lambda activation=activation: gated_activation.backward(x, x, x, activation)
    for double in (False, True):
        absmax = empty(576 * 9, dtype=torch.uint8 if double else torch.float32)
        nested = (torch.empty(21), torch.empty(())) if double else (None, None)
        result[f"nf4 {'double' if double else ''}"] = lambda absmax=absmax, nested=nested: dequantize.dequantize_4bit(
            empty(576 * 288, 1, dtype=torch.uint8), absmax, *nested, torch.empty(16), torch.empty(256), 64,
            (576, 576), dtype,
        )  # fmt: skip
    return result


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)  # fp16 is multiplied as bf16 is
def test_no_kernel_spills(target: str, dtype: torch.dtype) -> None:
    for name, subject in subjects(dtype).items():
        for launch in launches(target, subject):
            kernel = launch.build(target)
            assert spilled(kernel, target) == 0, (name, launch.options)
            assert shared(kernel) <= SHARED[target], (name, launch.options)


@triton.jit
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


def test_a_gpu_is_asked_for_nothing_until_there_is_one() -> None:
    """Importing the operations does not import Triton."""
    code = "import sys, peftc.kernels; sys.exit('triton' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
