"""How long steps take: several kinds of step, interleaved, the fastest round of each."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from peftc.graph.surroundings import uncollected

Step = Callable[[], object]


def fastest(steps: Mapping[str, Step], rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds of each step, the minimum over `rounds`; in a round each runs once, so that none has the quiet hour.

    On the CPU it is the time of the process, which other processes on the machine take nothing from, and at one
    thread the time of the computation. On CUDA it is the time between two events on the stream. Garbage is collected
    between the rounds and not in them. Warming up is the caller's part.
    """
    clock = _cuda_seconds if device.type == "cuda" else _process_seconds
    best = dict.fromkeys(steps, float("inf"))
    with uncollected():
        for _ in range(rounds):
            gc.collect()
            for name, step in steps.items():
                best[name] = min(best[name], clock(step))
    return best


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Operations of torch on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _process_seconds(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def _cuda_seconds(step: Step) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000
