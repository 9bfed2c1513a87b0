"""What compiling costs over `torch.export` alone, at 4, 8, 16 and 32 layers of SmolLM2-135M's shape.

    python examples/compile_time.py [--layers 4 8 16 32]

`torch.export` is a stage of every compile and is timed there: both figures come from one run, so that a machine that
is slow for a moment is slow for both. The fastest of three compiles counts.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import torch
import transformers

import peftc
from peftc.diagnostics.timings import Timings

SPEC = "apply lora(r=16, alpha=32) to attn.*, mlp.*"


def model_of(layers: int) -> transformers.PreTrainedModel:
    """Random weights: the graph does not depend on them."""
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def compile_once(model: transformers.PreTrainedModel) -> tuple[float, float]:
    """Seconds of the whole compile, and of its export."""
    timings = Timings()
    peftc.compile(model, SPEC, timings=timings)
    return sum(timings.seconds.values()), timings.seconds["torch.export"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    compile_once(model_of(1))  # what is imported and set up on first use is nobody's cost
    print(f"{'layers':>6} {'export':>9} {'compile':>9} {'ratio':>6} {'compile a layer':>16}")
    for layers in given.layers:
        model = model_of(layers)
        whole, export = min(compile_once(model) for _ in range(given.repeat))
        ratio, each = whole / export, whole / layers
        print(f"{layers:>6} {export:>7.2f} s {whole:>7.2f} s {ratio:>6.2f} {each:>14.3f} s", flush=True)


if __name__ == "__main__":
    main()
