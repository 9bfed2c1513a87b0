"""`peftc bench`: time, memory and operations of one training step, against the frozen base model and HF PEFT.

A step is a forward pass with labels and `loss.backward()`; there is no optimiser in it, which costs all the same. All
figures come from one process and one run.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from peftc.api import compile
from peftc.bench.agreement import Behaviour, behaviour, differences
from peftc.bench.allocations import peak_bytes
from peftc.bench.batches import Arguments, batch_for
from peftc.bench.errors import CannotMeasure
from peftc.bench.flops import count_flops
from peftc.bench.saved_bytes import saved_bytes
from peftc.bench.stopwatch import fastest, threads
from peftc.bench.variants import (
    FLOOR,
    FUSED,
    ONE_LIBRARY,
    PLAIN,
    Variant,
    floor,
    headline,
    hf_peft,
    torch_compiled,
)
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.timings import Timings
from peftc.driver.compiled import CompiledModule
from peftc.spec.check import SpecLike, intend

NOISE = 0.01  # standard deviation of what is added to all state: a branch that starts at zero would prove nothing
WARM_UP = 1  # steps after the one that is looked into, before the clock runs
SEED = 0


@dataclass(frozen=True)
class Measured:
    """What was measured of one variant; None where it could not be, or where there is no such variant."""

    name: str
    seconds: float | None = None
    saved: int | None = None  # bytes that autograd keeps for the backward
    peak: int | None = None  # bytes at the highest, above what is allocated between steps
    flops: int | None = None
    loss: float | None = None
    gradient: float | None = None  # the norm of all gradients of what learns
    trainable: int | None = None
    note: str = ""
    agrees: bool = True


@dataclass(frozen=True)
class Bench:
    """One run: what was measured on what. The first row is the floor."""

    model: str
    spec: str
    batch: int
    seq: int
    dtype: str
    device: str
    threads: int
    repeats: int
    rows: tuple[Measured, ...]
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether all variants compute the same."""
        return all(row.agrees for row in self.rows)

    def row(self, name: str) -> Measured | None:
        """The row of one variant."""
        return next((row for row in self.rows if row.name == name), None)

    def ratio(self, row: Measured, quantity: str) -> float | None:
        """A row's seconds, saved, peak or flops in units of the floor's."""
        own, unit = getattr(row, quantity), getattr(self.rows[0], quantity)
        return own / unit if own is not None and unit else None

    def to_json(self) -> dict[str, Any]:
        """All figures, with their ratios to the floor."""
        rows = []
        for row in self.rows:
            ratios = {name: self.ratio(row, name) for name in ("seconds", "saved", "peak", "flops")}
            rows.append(asdict(row) | {"ratio": ratios})
        return asdict(self) | {"rows": rows, "agrees": self.agrees}


def bench(
    model: nn.Module,
    spec: SpecLike,
    *,
    example: Any = None,
    calibration: Iterable[Any] | None = None,
    batch: int = 2,
    seq: int = 128,
    repeats: int = 5,
    thread_count: int = 1,
    with_torch_compile: bool = False,
    timings: Timings | None = None,
) -> Bench:
    """Measures `spec` on `model`, which is not changed.

    Args:
        model: on the device to measure on, in the precision to measure in.
        spec: as for `peftc.compile`.
        example: as for `peftc.compile`; it is then what is measured with, whatever `batch` and `seq` say.
        calibration: as for `peftc.compile`.
        batch: examples in a step.
        seq: tokens in an example.
        repeats: rounds, of which the fastest counts.
        thread_count: threads that torch computes with on the CPU.
        with_torch_compile: measure each variant under `torch.compile(fullgraph=True)`, too, which takes minutes.
        timings: collects seconds by stage.

    Raises:
        PeftcError: with every mistake in the spec; `cannot-measure` where the model fails on the batch.
    """
    timings = timings or Timings()
    intentions = intend(spec)
    data = None if calibration is None else list(calibration)
    with threads(thread_count):
        arguments = batch_for(model, example, batch, seq, SEED)
        _check_batch(model, arguments, f"{batch} × {seq}")
        fused = compile(model, intentions, example=example, calibration=data, timings=timings)
        plain = compile(model, intentions, example=example, calibration=data, fuse=False, timings=timings)
        if not fused.trainable_parameters():
            raise PeftcError(CannotMeasure(model=type(model).__name__, reason="nothing in it learns"))
        _start_alike(fused, plain)
        with timings.stage("HF PEFT"):
            variants = [floor(model), Variant(FUSED, fused), Variant(PLAIN, plain), hf_peft(model, fused)]
        if with_torch_compile:
            variants += [torch_compiled(variant) for variant in variants]
        if fused.device.type == "cpu" and fused.dtype is torch.float32:
            variants.insert(2, Variant(ONE_LIBRARY, fused, one_library=True))
        rows = _measured(variants, arguments, repeats, fused.device, timings)
    given = next(leaf for leaf in (*arguments[0], *arguments[1].values()) if isinstance(leaf, Tensor))
    return Bench(
        model=fused.plan.sites.model,
        spec="\n".join(row.statement for row in fused.plan.rows),
        batch=given.shape[0],
        seq=given.shape[1] if not given.is_floating_point() and given.dim() > 1 else 0,
        dtype=str(fused.dtype).removeprefix("torch."),
        device=device_name(fused.device),
        threads=thread_count,
        repeats=repeats,
        rows=rows,
        versions=versions(),
    )


def _check_batch(model: nn.Module, arguments: Arguments, size: str) -> None:
    """Whether the model itself takes the batch: longer than its table of positions, it would not."""
    try:
        with torch.no_grad():
            Variant(FLOOR, model).loss(arguments)
    except Exception as error:  # a model is anybody's code
        reason = f"it does not run on a batch of {size} ({headline(error)})"
        raise PeftcError(CannotMeasure(model=type(model).__name__, reason=reason)) from error


def _start_alike(fused: CompiledModule, plain: CompiledModule) -> None:
    """One state for both, with noise in all that learns."""
    random = torch.Generator().manual_seed(SEED)
    state = fused.state_dict()
    for name, parameter in fused.trainable_parameters().items():
        noise = NOISE * torch.randn(parameter.shape, generator=random)
        state[name] = parameter.detach() + noise.to(parameter)
    for module in (fused, plain):
        module.load_state_dict(state)


def _measured(
    variants: list[Variant], arguments: Arguments, repeats: int, device: torch.device, timings: Timings
) -> tuple[Measured, ...]:
    """A row a variant. All are warm before any is timed."""
    working: dict[str, Variant] = {}
    found: dict[str, Behaviour] = {}
    rows = {variant.name: Measured(variant.name, note=variant.missing) for variant in variants}
    random = _is_random(variants, arguments)
    for variant in variants:
        if variant.module is None:
            continue
        with timings.stage(f"first steps: {variant.name}"):
            try:
                found[variant.name] = behaviour(variant, arguments, training=not random)
                for _ in range(WARM_UP):
                    variant.step(arguments)
            except Exception as error:
                if not variant.foreign:
                    raise
                rows[variant.name] = Measured(variant.name, note=headline(error))
                continue
        working[variant.name] = variant
    with timings.stage("clock"):
        steps = {name: lambda variant=variant: variant.step(arguments) for name, variant in working.items()}
        seconds = fastest(steps, repeats, device)
    with timings.stage("memory"):
        for name, variant in working.items():
            rows[name] = _counted(variant, arguments, device, found[name], seconds[name])
    for name, problem in differences(found).items():
        rows[name] = replace(rows[name], note=problem, agrees=False)
    return tuple(rows.values())


def _counted(variant: Variant, arguments: Arguments, device: torch.device, seen: Behaviour, seconds: float) -> Measured:
    assert variant.module is not None
    given = [leaf for leaf in (*arguments[0], *arguments[1].values()) if isinstance(leaf, Tensor)]
    own = (*variant.module.parameters(), *variant.module.buffers(), *given)
    return Measured(
        variant.name,
        seconds=seconds,
        saved=saved_bytes(lambda: variant.loss(arguments), own),
        peak=peak_bytes(lambda: variant.step(arguments), device),
        # torch.compile's code calls kernels that no counter sees
        flops=None if variant.compiled else count_flops(lambda: variant.step(arguments)),
        loss=seen.loss,
        gradient=seen.norm,
        trainable=seen.trainable,
    )


def _is_random(variants: list[Variant], arguments: Arguments) -> bool:
    """Whether a training step draws random numbers, so that two of them differ: dropout, AdaMix."""
    plain = next(variant for variant in variants if variant.name == PLAIN)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        losses = []
        for seed in range(2):
            torch.manual_seed(seed)
            losses.append(float(plain.loss(arguments)))
    return losses[0] != losses[1]


def device_name(device: torch.device) -> str:
    """What figures were measured on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str]:
    """Of the libraries that were measured."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    try:
        import peft
    except ImportError:
        return found
    return found | {"peft": peft.__version__}
