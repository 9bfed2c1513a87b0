"""Checkpoints of random weights, written a shard at a time, and what compiling one takes of memory.

As a script, `python checkpoints.py FOLDER SPEC`: compiles the checkpoint in FOLDER and prints figures as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

POOL = 1 << 20


def write_llama(folder: Path, *, shard: int = 400 << 20, **settings: Any) -> int:
    """A bf16 Llama in files of about `shard` bytes, which is what it takes of memory; returns how many parameters."""
    config = LlamaConfig(**settings, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    groups = list(_shards(shapes, shard))
    index: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        save_file({name: _random(shapes[name], generator) for name in names}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(parameter.numel() for parameter in model.parameters())


def _shards(shapes: dict[str, tuple[int, ...]], limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        bytes_ = 2 * torch.Size(shape).numel()
        if names and size + bytes_ > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += bytes_
    yield names


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal numbers. A million are drawn for each tensor, and repeated, which packing does not see."""
    count = torch.Size(shape).numel()
    pool = torch.empty(min(count, POOL)).normal_(std=0.02, generator=generator).to(torch.bfloat16)
    return pool.repeat(-(-count // POOL))[:count].view(shape)


def memory(field: str) -> int:
    """Bytes by Linux's account of this process: VmRSS now, VmHWM at most since `forget_peak`.

    Not `getrusage`: after fork and exec its `ru_maxrss` starts from the parent's.
    """
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) << 10


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(folder: str, spec: str) -> dict[str, float]:
    """Compiles and returns bytes and seconds: the process before, its peak above that, and what it then holds."""
    import peftc

    before = memory("VmRSS")
    forget_peak()
    started = time.perf_counter()
    compiled = peftc.compile(folder, spec)
    seconds = time.perf_counter() - started
    tensors = {id(t): t for t in (*compiled.parameters(), *compiled.buffers())}.values()
    base = list(compiled.base.parameters())
    return {
        "own": before,
        "peak": memory("VmHWM") - before,
        "after": memory("VmRSS") - before,
        "compiled": sum(tensor.nbytes for tensor in tensors),
        "largest": max(tensor.nbytes for tensor in base),
        "dense": sum(tensor.nbytes for tensor in base),
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
