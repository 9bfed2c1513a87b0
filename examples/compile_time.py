"""What compiling costs beside `torch.export` alone, at 4, 8, 16 and 32 layers of SmolLM2-135M's shape.

    python examples/compile_time.py [--layers 4 8 16 32]

Process time of one thread; the bare export and the whole of `peftc.compile` take turns, and the least of three counts.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
import transformers
from transformers.exporters.exporter_dynamo import patch_forward_signature

import peftc
from peftc.inputs import example_inputs

SPEC = "apply lora(r=16, alpha=32) to attn.*, mlp.*"


def model_of(layers: int) -> transformers.PreTrainedModel:
    """Random weights: the graph does not depend on them."""
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bare_export(model: transformers.PreTrainedModel) -> None:
    """`torch.export` as one would call it by hand."""
    example = example_inputs(model)
    with torch.no_grad(), patch_forward_signature(model, example.kwargs):
        torch.export.export(
            model, (), example.kwargs, dynamic_shapes=example.dynamic_shapes(), strict=False
        )  # fmt: skip


def seconds(run: Callable[[], object]) -> float:
    """Process time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    bare_export(model_of(1))  # what is imported and set up on first use is nobody's cost
    peftc.compile(model_of(1), SPEC)
    print(f"{'layers':>6} {'export':>9} {'compile':>9} {'ratio':>6} {'compile a layer':>16}")
    for layers in given.layers:
        model = model_of(layers)
        runs = (partial(bare_export, model), partial(peftc.compile, model, SPEC))
        pairs = [[seconds(run) for run in runs] for _ in range(given.repeat)]
        export, compiling = (min(column) for column in zip(*pairs, strict=True))
        ratio, each = compiling / export, compiling / layers
        print(f"{layers:>6} {export:>7.2f} s {compiling:>7.2f} s {ratio:>6.2f} {each:>14.3f} s", flush=True)


if __name__ == "__main__":
    main()
