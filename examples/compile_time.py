"""What compiling costs at 8, 30 and 64 layers of SmolLM2-135M's shape: equal blocks are traced once.

    python examples/compile_time.py [--layers 8 30 64]

Seconds of one core (CPU time), so that it does not matter who else is at work. The fastest of three compiles counts.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings

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


def compile_once(model: transformers.PreTrainedModel) -> tuple[float, float]:
    """CPU seconds of the whole compile, and of a plan."""
    start = time.process_time()
    peftc.compile(model, SPEC)
    compiled = time.process_time()
    peftc.plan(model, SPEC)
    return compiled - start, time.process_time() - compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 30, 64])
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    compile_once(model_of(1))  # what is imported and set up on first use is nobody's cost
    print(f"{'layers':>6} {'compile':>9} {'plan':>9} {'compile a layer':>16}")
    for layers in given.layers:
        model = model_of(layers)
        whole, plan = (min(times) for times in zip(*(compile_once(model) for _ in range(given.repeat)), strict=True))
        print(f"{layers:>6} {whole:>7.2f} s {plan:>7.2f} s {whole / layers:>14.3f} s", flush=True)


if __name__ == "__main__":
    main()
