"""What examples/gpu.py runs, a stream at a time: each part's result is a line of JSON on standard output.

    python examples/gpu_parts.py STREAM [--skip N] [--dry]

The first line names the stream's parts, and the seconds that each may take; then each says what it found, or its
error, and behind an error there is nothing more: nobody knows what it left on the device.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

from peftc.bench.bench import bench, device_name, versions
from peftc.bench.generation import bench_generation
from peftc.bench.stopwatch import fastest
from peftc.bench.variants import HF_PEFT
from peftc.kernels.dequantize import dequantize_4bit

ROOT = Path(__file__).parent.parent
SPECS = ("lora", "dora", "lora_dropout", "loha", "lokr", "experts")  # of examples/benchmarks
QLORA = ROOT / "examples" / "recipes" / "qlora.peft"
MEASURED = "measured"  # the stream that has the device to itself
Found = dict[str, Any]


@dataclass(frozen=True)
class Part:
    name: str
    seconds: float  # that it may take
    run: Callable[[], Found]


@dataclass(frozen=True)
class Size:
    """How large everything is: as it is worth measuring, or as small as it goes."""

    device: str
    dtype: torch.dtype
    llama: Found
    mixtral: Found
    batch: int
    seq: int
    repeats: int
    tokens: int  # of text
    side: int  # of square matrices

    def model(self, spec: str = "") -> Any:
        """With random weights, the same each time."""
        torch.manual_seed(0)
        with torch.device(self.device):
            if spec == "experts":
                made: Any = MixtralForCausalLM(MixtralConfig(**self.mixtral))
            else:
                made = LlamaForCausalLM(LlamaConfig(**self.llama))
            return made.to(self.dtype)


REAL = Size(
    "cuda", torch.bfloat16,
    {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
     "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8,
     "num_attention_heads": 16, "num_key_value_heads": 4, "num_local_experts": 8},
    batch=4, seq=1024, repeats=10, tokens=64, side=8192,
)  # fmt: skip
TINY = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
DRY = Size(
    "cpu", torch.float32, TINY, TINY | {"num_local_experts": 2, "num_key_value_heads": 4},
    batch=2, seq=16, repeats=1, tokens=2, side=256,
)  # fmt: skip


def kernels(dtype: str, device: str) -> list[Part]:
    """Every kernel against its definition, in one precision."""
    from interpreted import CASES  # imports Triton

    def check(case: Callable[[torch.dtype], None]) -> Found:
        torch.manual_seed(0)
        with torch.device(device):
            case(getattr(torch, dtype))
        return {}

    return [Part(f"kernel {name} {dtype}", 120, partial(check, case)) for name, case in CASES.items()]


def tests() -> Found:
    """Those that are marked for a GPU; where there is none, all are skipped."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rfE", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*command, "-o", "filterwarnings=default", *map(str, files)], cwd=ROOT, capture_output=True, text=True
    )
    lines = ran.stdout.strip().splitlines() or [""]
    assert ran.returncode == 0, "\n".join([lines[-1], *lines[-30:], ran.stderr[-2000:]])
    return {"tests": lines[-1]}


def machine(size: Size) -> Found:
    """What this is, and the two ceilings: bytes moved by a copy, and operations of a product."""
    side = 2 * size.side
    x, y = (torch.randn(side, side, device=size.device).to(size.dtype) for _ in range(2))
    steps: dict[str, Callable[[], object]] = {"copy": lambda: y.copy_(x), "product": lambda: x @ y}
    for step in steps.values():
        step()
    seconds = fastest(steps, size.repeats, x.device)
    known: Found = {"device": device_name(x.device), "versions": versions()}
    if x.is_cuda:
        known |= {"capability": torch.cuda.get_device_capability(), "bytes": torch.cuda.mem_get_info()[1]}
    rates = {
        "copy GB/s": 2 * x.nbytes / 1e9 / seconds["copy"],
        "product TFLOP/s": 2 * side**3 / 1e12 / seconds["product"],
    }
    return known | rates


def step(size: Size, name: str, spec: Path, compiled: bool = False) -> Found:
    """`peftc bench SPEC`: time, saved bytes and peak, beside the frozen floor and HF PEFT."""
    found = bench(
        size.model(name), spec, batch=size.batch, seq=size.seq, repeats=size.repeats, with_torch_compile=compiled
    )
    if spec == QLORA:  # HF PEFT's model is of the dense weights, and so another
        rows = tuple(replace(row, agrees=True) if row.name == HF_PEFT else row for row in found.rows)
        found = replace(found, rows=rows)
    return found.to_json()


def text(size: Size, spec: Path) -> Found:
    """`peftc bench SPEC --generate`: tokens a second, beside the base model and HF PEFT.

    Texts of random weights part where two tokens are as likely: whether they are the same says nothing.
    """
    found = bench_generation(size.model(), spec, prompt=16, new=size.tokens, repeats=min(size.repeats, 3))
    return replace(found, rows=tuple(replace(row, agrees=True) for row in found.rows)).to_json()


def unpack(size: Size) -> Found:
    """Four bits to dense weights: bytes read and written a second, where a copy is the ceiling."""
    count = size.side**2
    with torch.device(size.device):
        packed, absmax = torch.randint(256, (count // 2, 1), dtype=torch.uint8), torch.rand(count // 64)
        coded, nested = torch.randint(256, absmax.shape, dtype=torch.uint8), torch.rand(-(-count // 64 // 256))
        offset = torch.tensor(0.25)
        dense = torch.empty(size.side, size.side, dtype=size.dtype)
    rest = ("nf4", 64, dense.shape, size.dtype)
    steps: dict[str, Callable[[], object]] = {
        "nf4": lambda: dequantize_4bit(packed, absmax, None, None, *rest),
        "nf4 double": lambda: dequantize_4bit(packed, coded, nested, offset, *rest),
        "copy": lambda: dense.clone(),
    }
    moved = {
        "nf4": packed.nbytes + absmax.nbytes + dense.nbytes,
        "nf4 double": packed.nbytes + coded.nbytes + nested.nbytes + dense.nbytes,
        "copy": 2 * dense.nbytes,
    }
    for one in steps.values():
        one()
    seconds = fastest(steps, size.repeats, dense.device)
    return {"numbers": count} | {f"{name} GB/s": moved[name] / 1e9 / seconds[name] for name in steps}


def parts(stream: str, dry: bool) -> list[Part]:
    """Of one stream, the most important first."""
    size = DRY if dry else REAL
    if stream == "tests":
        return [Part("tests", 300, tests)]
    if stream != MEASURED:
        return kernels(stream, size.device)
    specs = {name: ROOT / "examples" / "benchmarks" / f"{name}.peft" for name in SPECS}
    return [
        Part("machine", 60, partial(machine, size)),
        *[Part(f"step {name}", 90, partial(step, size, name, spec)) for name, spec in specs.items()],
        Part("nf4 unpack", 60, partial(unpack, size)),
        Part("step qlora", 90, partial(step, size, "qlora", QLORA)),
        Part("text lora", 90, partial(text, size, specs["lora"])),
        Part("text qlora", 90, partial(text, size, QLORA)),
        *[
            Part(f"torch.compile {name}", 240, partial(step, size, name, specs[name], True))
            for name in (SPECS[:1] if dry else SPECS)  # on the CPU, a minute each
        ],
    ]  # fmt: skip


def outcome(part: Part) -> Found:
    """What a part found, or its error, with the most memory that it held."""
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        found = part.run()
    except Exception as error:  # whatever may happen where nobody has tried
        first = next(iter(str(error).splitlines()), "")
        return {"error": f"{type(error).__name__}: {first}", "trace": traceback.format_exc()[-6000:]}
    if on_cuda:
        found["allocated"] = torch.cuda.max_memory_allocated()
        gc.collect()
        torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stream", help=f"a precision of the kernels, tests, or {MEASURED}")
    parser.add_argument("--skip", type=int, default=0, help="so many parts, which ran already")
    parser.add_argument("--only", nargs="+", default=[""], help="parts with one of these in their name")
    parser.add_argument("--dry", action="store_true", help="on the CPU, as small as it goes")
    given = parser.parse_args()
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no result
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    chosen = [part for part in parts(given.stream, given.dry) if any(word in part.name for word in given.only)]
    print(json.dumps([(part.name, part.seconds) for part in chosen]), file=results, flush=True)
    for part in chosen[given.skip :]:
        found = outcome(part)
        print(json.dumps(found), file=results, flush=True)
        if "error" in found:
            return


if __name__ == "__main__":
    main()
