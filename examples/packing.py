"""Texts in a row without padding against the same texts padded: a part of `examples/benchmark.py`.

64 texts whose lengths are drawn from a log-normal distribution (median 90; the longest of 64 is expected to have 512,
and none has more), in batches of 8 in the order drawn. HF PEFT gets each batch padded to its longest text, peftc as
`transformers.DataCollatorWithFlattening` makes it. A step is a forward pass with labels and `loss.backward()`, on one
thread, by the time of that thread; in a round each way takes each batch once, one after the other, and of each batch
the fastest round counts.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

import peftc
from models import smollm2
from peftc.bench.bench import SEED, versions
from peftc.bench.saved_bytes import saved_bytes
from peftc.bench.stopwatch import threads
from peftc.bench.variants import FUSED, HF_PEFT, Variant, hf_peft

NAME = "packing"
TEXTS, BATCH, MEDIAN, MOST = 64, 8, 90, 512
SPREAD = math.log(MOST / MEDIAN) / 2.39  # of 64 normal numbers the largest is expected at 2.39
TARGET = 0.45
Batch = dict[str, Any]


def lengths(count: int = TEXTS) -> list[int]:
    """How many tokens each text has."""
    random = torch.Generator().manual_seed(SEED)
    drawn = (torch.randn(count, generator=random) * SPREAD + math.log(MEDIAN)).exp()
    return [min(max(round(length), 2), MOST) for length in drawn.tolist()]


def drawn(sizes: list[int], vocabulary: int) -> list[Tensor]:
    """Texts of these lengths, of random tokens that are no padding."""
    random = torch.Generator().manual_seed(SEED)
    return [torch.randint(3, vocabulary, (length,), generator=random) for length in sizes]


def padded(texts: list[Tensor]) -> Batch:
    """A row a text."""
    longest = max(map(len, texts))

    def rows(fill: int, items: list[Tensor]) -> Tensor:
        return torch.stack([torch.nn.functional.pad(item, (0, longest - len(item)), value=fill) for item in items])

    masks = [torch.ones_like(text) for text in texts]
    return {"input_ids": rows(0, texts), "attention_mask": rows(0, masks), "labels": rows(-100, texts)}


def flattened(texts: list[Tensor]) -> Batch:
    """All in one row, as transformers' collator has them."""
    batch: Batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": text.tolist()} for text in texts])
    return batch


def measured(spec: Path, repeats: int, count: int = TEXTS) -> dict[str, Any]:
    """All figures of one run, on so many texts."""
    model = smollm2()
    texts = drawn(lengths(count), model.config.vocab_size)
    groups = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    with threads(1):
        compiled = peftc.compile(model, spec)
        random = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for parameter in compiled.trainable_parameters().values():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=random))
        theirs = hf_peft(model, compiled)
        ways = {
            FUSED: (Variant(FUSED, compiled), [flattened(group) for group in groups]),
            HF_PEFT: (theirs, [padded(group) for group in groups]),
        }
        rows = _rows(ways, repeats)
    tokens, places = sum(map(len, texts)), sum(batch["input_ids"].numel() for batch in ways[HF_PEFT][1])
    return {
        "texts": count, "batch": BATCH, "tokens": tokens, "padded_tokens": places, "longest": max(map(len, texts)),
        "repeats": repeats, "threads": 1, "dtype": "float32", "rows": rows, "versions": versions(),
    }  # fmt: skip


def _rows(ways: Mapping[str, tuple[Variant, list[Batch]]], repeats: int) -> list[dict[str, Any]]:
    """For each way the seconds of all batches, the most that autograd keeps of one, and the batches' losses."""
    best: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    for name, (variant, batches) in ways.items():  # warm before the clock runs
        variant.step(((), batches[0]))
        best[name], losses[name] = [math.inf] * len(batches), [math.nan] * len(batches)
    gc.disable()
    for number in range(repeats):
        gc.collect()
        for place in range(len(next(iter(best.values())))):
            for name, (variant, batches) in ways.items():
                start = time.thread_time()
                loss = variant.step(((), batches[place]))
                best[name][place] = min(best[name][place], time.thread_time() - start)
                losses[name][place] = loss.item()
            done = {name: round(sum(times[: place + 1]), 2) for name, times in best.items()}
            print(f"packing: round {number + 1} of {repeats}, batch {place + 1}: {done}", file=sys.stderr, flush=True)
    gc.enable()
    rows = []
    for name, (variant, batches) in ways.items():
        assert variant.module is not None
        own = (*variant.module.parameters(), *variant.module.buffers())
        largest = max(batches, key=lambda batch: int(batch["input_ids"].numel()))
        saved = saved_bytes(partial(variant.loss, ((), largest)), (*own, *largest.values()))
        rows.append({"name": name, "seconds": sum(best[name]), "saved": saved, "losses": losses[name]})
    return rows


def markdown(found: Mapping[str, Any]) -> str:
    """The table: of each way its places, milliseconds a token of the texts, and what autograd keeps, and the ratios."""
    rows = {row["name"]: row for row in found["rows"]}
    theirs = rows[HF_PEFT]
    lines = [
        "| texts | tokens computed | ms a token | × HF PEFT | target | kept at most | × HF PEFT |",
        f"|{'---|' * 7}",
    ]
    for name, title, places, target in (
        (FUSED, "peftc, in a row", found["tokens"], f"≤ {TARGET}"),
        (HF_PEFT, "HF PEFT, padded", found["padded_tokens"], ""),
    ):
        row = rows[name]
        cells = (
            title, f"{places:,}".replace(",", " "), f"{1000 * row['seconds'] / found['tokens']:.2f}",
            f"{row['seconds'] / theirs['seconds']:.2f}", target, f"{row['saved'] / 1e6:.0f} MB",
            f"{row['saved'] / theirs['saved']:.2f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
