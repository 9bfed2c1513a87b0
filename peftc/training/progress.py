"""What a training says while it runs: steps, loss, tokens a second, memory."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

GIB = 1 << 30
LOSSES = {"loss": "loss", "eval_loss": "held-out loss"}  # as a Trainer logs them


class Told(TrainerCallback):
    """On a terminal a bar; elsewhere a line whenever there is something to log."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self.console = console
        self.quiet = quiet
        self.bar: Progress | None = None
        self.task: Any = None
        self.since: tuple[float, int] | None = None  # the end of the first step, which may capture a graph
        self.rate = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.since = None
        if self.quiet or not state.is_world_process_zero or not self.console.is_terminal:
            return
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console)
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.since is None:
            self.since = (time.perf_counter(), int(state.num_input_tokens_seen))
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        now, tokens = time.perf_counter(), int(state.num_input_tokens_seen)
        start, seen = self.since or (now, tokens)
        if tokens > seen and "loss" in (logs or {}):
            self.rate = (tokens - seen) / (now - start)
        logs = logs or {}
        told = [f"{name} {logs[key]:.4f}" for key, name in LOSSES.items() if key in logs]
        if not told or not state.is_world_process_zero:
            return
        speed = f" · {self.rate:,.0f} tokens/s" if self.rate else ""
        text = f"{told[0]}{speed} · {peak_memory() / GIB:.2f} GiB"
        if self.bar is not None:
            self.bar.update(self.task, description=text)
        elif not self.quiet:
            self.console.print(f"step {state.global_step}/{state.max_steps} · {text}", soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def peak_memory() -> int:
    """Bytes: the most that was allocated on a GPU, or that this process had in memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
