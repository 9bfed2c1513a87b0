"""Seconds by stage, and who is told which stage runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Progress = Callable[[str], None]


@dataclass
class Timings:
    """Seconds of wall clock by stage, in the order they ran."""

    seconds: dict[str, float] = field(default_factory=dict)
    progress: Progress = lambda _stage: None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times one stage and announces it."""
        self.progress(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
