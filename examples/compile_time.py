"""What compiling costs at 8, 30 and 64 layers of SmolLM2-135M's shape: equal blocks are traced once.

    python examples/compile_time.py [--layers 8 30 64]

Seconds of one core (CPU time), so that it does not matter who else is at work. The fastest of three compiles counts;
`peftc.load` of an artifact is that of a model whose graph was captured before, and is read.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers

import peftc

SPEC = "apply lora(r=16, alpha=32) to attn.*, mlp.*"


def model_of(layers: int) -> transformers.PreTrainedModel:
    """Random weights: the graph does not depend on them."""
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def compile_once(model: transformers.PreTrainedModel, graphs: str) -> tuple[float, float, float]:
    """CPU seconds of the compile, of a plan, neither with a graph that was captured before, and of a load with one."""
    os.environ["PEFTC_GRAPHS"] = ""
    whole, compiled = seconds(lambda: peftc.compile(model, SPEC))
    plan, _ = seconds(lambda: peftc.plan(model, SPEC))
    os.environ["PEFTC_GRAPHS"] = graphs
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(folder)
        peftc.load(folder, model)
        load, _ = seconds(lambda: peftc.load(folder, model))
    return whole, plan, load


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """How long something takes, and what it returns."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 30, 64])
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as graphs:
        compile_once(model_of(1), graphs)  # what is imported and set up on first use is nobody's cost
        print(f"{'layers':>6} {'compile':>9} {'plan':>9} {'load':>9} {'compile a layer':>16}")
        for layers in given.layers:
            model = model_of(layers)
            times = zip(*(compile_once(model, graphs) for _ in range(given.repeat)), strict=True)
            whole, plan, load = map(min, times)
            row = f"{layers:>6} {whole:>7.2f} s {plan:>7.2f} s {load:>7.2f} s {whole / layers:>14.3f} s"
            print(row, flush=True)


if __name__ == "__main__":
    main()
