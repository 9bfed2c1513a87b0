"""What is read off a kernel's source is what it does: in Triton's interpreter, in every case that its results have."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys

import pytest

pytest.importorskip("triton")

import triton

import peftc.kernels.gpu
from paths import OPERATIONS, ROOT


def kernels() -> set[str]:
    """Every kernel of peftc's: what is launched, not what a kernel calls."""
    found = set()
    for module in pkgutil.iter_modules(peftc.kernels.gpu.__path__, "peftc.kernels.gpu."):
        for name, item in vars(importlib.import_module(module.name)).items():
            if isinstance(item, triton.JITFunction) and name.endswith("_kernel"):
                found.add(f"{item.__module__}.{name}")
    return found


@pytest.mark.slow
def test_kernels_touch_what_their_sources_say() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{OPERATIONS}"}
    command = [sys.executable, str(OPERATIONS / "touching.py")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert set(ran.stdout.split()) == kernels()
