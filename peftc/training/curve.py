"""The losses of a run: a line of blocks for a terminal, a picture, a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from peftc.files.whole import write_whole

BARS = "▁▂▃▄▅▆▇█"
MOST = 60


def line(losses: Sequence[float]) -> str:
    """Losses as blocks, the highest the highest; of many, means of some."""
    if not losses:
        return ""
    size = -(-len(losses) // MOST)
    means = [sum(part) / len(part) for part in (losses[i : i + size] for i in range(0, len(losses), size))]
    low, high = min(means), max(means)
    heights = (int((mean - low) / (high - low) * (len(BARS) - 1) + 0.5) if high > low else 0 for mean in means)
    return "".join(BARS[height] for height in heights)


def picture(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draws the losses by step as a PNG; False where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, marker="o" if len(points) < 3 or name == "eval_loss" else None, label=label)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = BytesIO()
    figure.savefig(drawn, dpi=150)
    write_whole(path, drawn.getvalue())
    return True


def write(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """What was logged, a line of JSON each."""
    write_whole(path, "".join(json.dumps(entry) + "\n" for entry in history))
