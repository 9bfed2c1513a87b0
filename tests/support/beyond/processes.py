"""Two gloo processes beside a test, and what they learn there."""

import os
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

import peftc

TOLERANCE = 1e-5
BEFORE, AFTER = 3, 2  # steps, and those after going on


def optimiser(compiled: peftc.CompiledModule) -> torch.optim.Optimizer:
    return torch.optim.AdamW(compiled.trainable_parameters().values(), lr=1e-2)


def train(
    compiled: peftc.CompiledModule, optimizer: torch.optim.Optimizer, steps: int, rows: slice = slice(None)
) -> Tensor:
    """The losses of some steps on some rows of the same four."""
    tokens = torch.randint(0, 97, (4, 12), generator=torch.Generator().manual_seed(2))[rows]
    losses = []
    for _ in range(steps):
        loss = compiled(input_ids=tokens, labels=tokens).loss
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.stack(losses)


def on_two(folder: Path, work: Callable[[int, Callable[[], None]], None]) -> None:
    """Runs `work` in two processes, which are one group from the call of what they are given; their errors are told.

    Before a fork nothing may have been differentiated.
    """
    children = []
    for rank in range(2):
        if child := os.fork():
            children.append(child)
            continue
        failed = 1
        try:
            torch.set_num_threads(1)
            method = f"file://{folder}/rendezvous"
            work(rank, partial(dist.init_process_group, "gloo", init_method=method, rank=rank, world_size=2))
            failed = 0
        except BaseException:
            traceback.print_exc()
        os._exit(failed)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def same(one: Path, other: Path) -> None:
    """Two saved adapters have the same tensors."""
    first, second = (load_file(folder / "adapter.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=TOLERANCE)
