"""The most memory that a step holds at one time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The high-water mark over `step`, above what was allocated when it began.

    On the CPU it is the running sum of every block that torch's allocator gives and takes back, as its profiler
    records them: activations, gradients and what kernels allocate inside, whoever wrote them. Not in it is what a
    library takes elsewhere, such as oneDNN's scratch space. On CUDA it is `max_memory_allocated`.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    level = highest = 0
    for change in _changes(step):
        level += change
        highest = max(highest, level)
    return highest


def _changes(step: Callable[[], object]) -> list[int]:
    """Bytes allocated (positive) and freed (negative), in the order of events."""
    with _silent():
        profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        profiler.start()
    try:
        step()
    finally:
        with _silent():
            profiler.stop()
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]  # the public lists are sums
    events = [event for event in results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing on standard error: the profiler of torch writes a line there whenever it starts or stops."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)
