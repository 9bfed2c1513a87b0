"""Triton's kernels compiled ahead of time, as their launchers would launch them: no GPU and no driver is needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, CompiledKernel

from peftc.kernels.gpu import launch

# bytes of shared memory that a program may have: A100, H100, MI300
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64),
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel and everything it would be compiled with."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    def build(self, target: str) -> CompiledKernel:
        """Compiles it with what Triton would specialise on: a 1 is a constant, divisibility by 16 is known."""
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            given = self.arguments[parameter.name]
            special = type(given) is int and not parameter.do_not_specialize
            if parameter.is_constexpr or (special and given == 1):
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = given
            elif isinstance(given, Tensor):
                signature[parameter.name] = TYPES[given.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = "fp32" if isinstance(given, float) else "i32"
                if special and given % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=TARGETS[target], options=self.options)


@contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """Launches inside are written down, with the tiles for `target`, and not run."""
    found: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        options = {name: given.pop(name) for name in OPTIONS if name in given}
        found.append(Launch(kernel, given, options))

    amd = mock.patch.object(launch, "is_amd", return_value=TARGETS[target].backend == "hip")
    with mock.patch.object(triton.JITFunction, "run", run), amd:
        yield found


def launches(target: str, function: Callable[..., Any], *arguments: Any) -> list[Launch]:
    """What `function` would launch."""
    with recorded(target) as found:
        function(*arguments)
    assert found
    return found


def spilled(kernel: CompiledKernel, target: str) -> int:
    """Bytes (NVIDIA) or registers (AMD) that a compiled kernel keeps in memory for want of room."""
    if TARGETS[target].backend == "hip":
        assembly = str(kernel.asm["amdgcn"])
        return sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", assembly))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(str(kernel.asm["ptx"]))
        architecture = re.search(r"\.target\s+(\S+)", source.read_text())
        assert architecture is not None
        command = [get_ptxas(TARGETS[target].arch).path, "-v", f"--gpu-name={architecture[1].rstrip(',')}",
                   str(source), "-o", str(Path(folder, "kernel.o"))]  # fmt: skip
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    counts = re.findall(r"(\d+) bytes spill", printed)
    assert counts, printed
    return sum(map(int, counts))


def shared(kernel: CompiledKernel) -> int:
    """Bytes of shared memory of one program."""
    return int(kernel.metadata.shared)
