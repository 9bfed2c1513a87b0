"""`peftc bench`: what a training step costs, beside what it could cost at best and what it costs elsewhere."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from peftc.bench.errors import NoDevice
from peftc.cli.common.command import Argument, Command
from peftc.cli.common.inputs import (
    CALIBRATION,
    DTYPE,
    JSON,
    LABELS,
    MODEL,
    RANDOM_WEIGHTS,
    SPEC,
    TASK,
    TRUST,
    amount,
    calibration_batches,
    checked_spec,
    load_model,
    positive,
)
from peftc.cli.common.output import print_json, progress
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.lazy import Lazy

if TYPE_CHECKING:
    from torch import nn

    from peftc import api
    from peftc.bench import bench, generation, table
    from peftc.bench.counting import cards, count
    from peftc.bench.counting import table as count_table
    from peftc.diagnostics.timings import Timings
    from peftc.driver import loading
    from peftc.show import screen
    from peftc.spec.resolve import Intentions
else:
    api, loading = Lazy("peftc.api"), Lazy("peftc.driver.loading")
    bench = Lazy("peftc.bench.bench")
    cards, count = Lazy("peftc.bench.counting.cards"), Lazy("peftc.bench.counting.count")
    count_table = Lazy("peftc.bench.counting.table")
    generation = Lazy("peftc.bench.generation")
    table = Lazy("peftc.bench.table")
    screen = Lazy("peftc.show.screen")


def run(given: Namespace) -> int:
    """Measures a training step against the frozen base model and HF PEFT."""
    with progress(given) as timings:
        spec = checked_spec(given, timings)
        if given.count:
            return _counted(spec, given, timings)
        with timings.stage("load"):
            batches = calibration_batches(given)
            loaded = load_model(given, dtype=given.dtype)
        model, example = loaded.model, loaded.example
        if loaded.differences.fresh:
            loading.knowing(given.model, api.plan(model, spec, example=example), loaded.differences)
        with timings.stage("load"):
            _move(model, given.device)
        if given.generate:
            return _generated(generation.bench_generation(
                model, spec, example=example, calibration=batches, batch=given.batch, prompt=given.seq or 16,
                new=given.generate, repeats=given.repeats, thread_count=given.threads, timings=timings,
            ), given)  # fmt: skip
        found = bench.bench(
            model, spec, example=example, calibration=batches, batch=given.batch or 2, seq=given.seq or 128,
            repeats=given.repeats, thread_count=given.threads, with_torch_compile=given.torch_compile, timings=timings,
        )  # fmt: skip
    if given.json:
        print_json(found.to_json())
    else:
        screen.print_all(table.bench_table(found))
    return 0 if found.agrees else 1


def _counted(spec: Intentions, given: Namespace, timings: Timings) -> int:
    """A step on shapes alone."""
    scale = 1e12
    card = cards.card_of(given.card, given.bandwidth and given.bandwidth * scale, given.tflops and given.tflops * scale)
    with timings.stage("load"):
        loaded = load_model(given, dtype=given.dtype, meta=True)
    found = count.count(
        loaded.model, spec, example=loaded.example, batch=given.batch or 1, seq=given.seq or 512,
        card=card, timings=timings,
    )  # fmt: skip
    if given.json:
        print_json(found.to_json() | {"time": timings.seconds})
    else:
        screen.print_all(count_table.count_table(found, verbose=given.verbose))
    return 0


def _generated(found: generation.GenerationBench, given: Namespace) -> int:
    if given.json:
        print_json(found.to_json())
    else:
        screen.print_all(generation.generation_table(found))
    return 0 if found.agrees else 1


def _move(model: nn.Module, device: str) -> None:
    """`model` on the device of that name."""
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter where it was built without CUDA
        raise PeftcError(NoDevice(name=device, reason=str(error).splitlines()[0])) from error


COMMAND = Command(
    "bench",
    run,
    (
        SPEC,
        MODEL,
        JSON,
        Argument("--generate", type=positive, metavar="TOKENS", help="measure text of so many new tokens, not a step"),
        Argument("--count", action="store_true", help="count launches and bytes of a step on a GPU, without one"),
        Argument("--card", metavar="NAME", help="with --count: estimate a step's time, on h100, h200, a100, …"),
        Argument("--bandwidth", type=amount, metavar="TB/S", help="of the card's memory, in place of what is known"),
        Argument("--tflops", type=amount, metavar="RATE", help="of the card's products, in place of what is known"),
        Argument("--verbose", action="store_true", help="with --count: the ten kinds with the most launches and bytes"),
        Argument("--batch", type=positive, help="examples in a step (2), or texts at once (1, or 2 a task)"),
        Argument("--seq", type=positive, help="tokens in an example (128), or in what a text begins with (16)"),
        Argument("--repeats", type=positive, default=5, help="rounds, of which the fastest counts"),
        Argument("--threads", type=positive, default=1, help="threads to compute with on the CPU"),
        Argument("--device", default="cpu", help="cpu, cuda, cuda:1, …"),
        Argument("--torch-compile", action="store_true", help="each also under torch.compile(fullgraph=True)"),
        CALIBRATION,
        RANDOM_WEIGHTS,
        TASK,
        LABELS,
        DTYPE,
        TRUST,
    ),
)
