"""What Triton's kernels load and store in its interpreter is what is read off their sources.

Run as a script with TRITON_INTERPRET=1, like `interpreted.py`, whose cases it runs.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
from triton.runtime.jit import JITFunction

from interpreted import CASES
from peftc.bench.counting.sources import touched

LOADED: list[Any] = []
STORED: list[Any] = []
SEEN: set[str] = set()

run, load, store = (
    InterpretedFunction.run,
    InterpreterBuilder.create_masked_load,
    InterpreterBuilder.create_masked_store,
)
compiled = cache(JITFunction)


def loading(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
    LOADED.append(pointers.data[mask.data.astype(bool)])
    return load(builder, pointers, mask, *rest)


def storing(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    STORED.append(pointers.data[mask.data.astype(bool)])
    return store(builder, pointers, value, mask, *rest)


def watched(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    LOADED.clear()
    STORED.clear()
    result = run(kernel, *args, grid=grid, warmup=warmup, **kwargs)
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    told = touched(compiled(kernel.fn), given)
    for kind, names, addresses in (("reads", told.read, LOADED), ("writes", told.written, STORED)):
        said = {place(given[name]) for name in names if isinstance(given[name], Tensor)}
        found = {place(item) for item in given.values() if isinstance(item, Tensor) and within(item, addresses)}
        assert said == found, f"{kernel.__name__} {kind} {said}, of {sorted(names)}, and not {found}"
    SEEN.add(f"{kernel.fn.__module__}.{kernel.__name__}")
    return result


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def within(tensor: Tensor, addresses: list[Any]) -> bool:
    """Whether an address is in a tensor's memory."""
    start = place(tensor)
    end = start + tensor.untyped_storage().nbytes()
    return any(bool(np.any((one >= start) & (one < end))) for one in addresses)


if __name__ == "__main__":
    torch.manual_seed(0)
    with (
        mock.patch.object(InterpretedFunction, "run", watched),
        mock.patch.object(InterpreterBuilder, "create_masked_load", loading),
        mock.patch.object(InterpreterBuilder, "create_masked_store", storing),
    ):
        for check in CASES.values():
            check(torch.float32)
    print("\n".join(sorted(SEEN)))
