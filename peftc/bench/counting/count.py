"""`peftc bench --count`: launches, bytes and operations of a training step on a GPU, counted without one.

The model, its compiled graph and HF PEFT's model of the same spec run a step on the meta device, in eager mode. Nothing
is read, nothing is computed, and a model of any size fits.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftc.api import compile
from peftc.bench.batches import Arguments, batch_for
from peftc.bench.counting.cards import Card, kinds
from peftc.bench.counting.meter import Launch, Meter
from peftc.bench.counting.on_cuda import OnCuda
from peftc.bench.errors import CannotMeasure
from peftc.bench.variants import FUSED, HF_PEFT, Variant, floor, headline
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.timings import Timings
from peftc.driver.compiled import CompiledModule
from peftc.files.hf_peft.folder import CONFIG, exported
from peftc.spec.check import SpecLike, intend

MASK = "attention_mask"


@dataclass(frozen=True)
class Counted:
    """What a step of one variant launches; `note` says why there is none."""

    name: str
    launches: Counter[Launch] | None = None
    waits: int = 0  # how often the host waits for a value
    note: str = ""

    @property
    def total(self) -> int | None:
        """How many launches."""
        return None if self.launches is None else self.launches.total()

    @property
    def bytes(self) -> int | None:
        """Bytes read and written by all of them."""
        return self._sum(lambda launch: launch.bytes)

    @property
    def flops(self) -> int | None:
        """Operations of products, in all of them."""
        return self._sum(lambda launch: launch.flops)

    def _sum(self, amount: Callable[[Launch], int]) -> int | None:
        if self.launches is None:
            return None
        return sum(amount(launch) * count for launch, count in self.launches.items())


@dataclass(frozen=True)
class Counts:
    """One run. The first row is the frozen base model's."""

    model: str
    spec: str
    batch: int
    seq: int
    dtype: torch.dtype
    rows: tuple[Counted, ...]
    card: Card | None = None

    def row(self, name: str) -> Counted:
        """The row of one variant."""
        return next(row for row in self.rows if row.name == name)

    def seconds(self, row: Counted) -> float | None:
        """The estimate of a row's step on the card; None where there is no card or no row."""
        return None if self.card is None or row.launches is None else self.card.seconds(row.launches, self.dtype)

    def ratio(self, row: Counted, quantity: str, beside: str) -> float | None:
        """A row's total, bytes, flops or seconds over those of the row named `beside`."""
        own, unit = (
            self.seconds(one) if quantity == "seconds" else getattr(one, quantity) for one in (row, self.row(beside))
        )
        return own / unit if own is not None and unit else None

    def to_json(self) -> dict[str, Any]:
        """All figures, with each kind of launch."""
        rows = []
        for row in self.rows:
            named = ("launches", "bytes", "flops")
            rows.append({
                "name": row.name, "launches": row.total, "bytes": row.bytes, "flops": row.flops, "waits": row.waits,
                "seconds": self.seconds(row), "note": row.note,
                "over_hf_peft": {
                    key: self.ratio(row, attribute, HF_PEFT)
                    for key, attribute in (("launches", "total"), ("bytes", "bytes"), ("flops", "flops"))
                },
                "kinds": [dict(zip(("name", *named), kind, strict=True)) for kind in kinds(row.launches or {})],
            })  # fmt: skip
        card = None if self.card is None else vars(self.card)
        return {
            "model": self.model, "spec": self.spec, "batch": self.batch, "seq": self.seq,
            "dtype": str(self.dtype).removeprefix("torch."), "card": card, "rows": rows,
        }  # fmt: skip


def count(
    model: nn.Module,
    spec: SpecLike,
    *,
    example: Any = None,
    batch: int = 1,
    seq: int = 512,
    card: Card | None = None,
    timings: Timings | None = None,
) -> Counts:
    """Counts a training step of `spec` on `model`, which is not changed.

    The batch is as long everywhere, so no mask is given where the model does without one.

    Args:
        model: on whatever device, with weights or on the meta device.
        spec: as for `peftc.compile`.
        example: as for `peftc.compile`; it is then what is counted with, whatever `batch` and `seq` say.
        batch: examples in a step.
        seq: tokens in an example.
        card: what to estimate the time of a step for.
        timings: collects seconds by stage.

    Raises:
        PeftcError: with every mistake in the spec; `cannot-measure` where the model does not run on the meta device,
            `needs-values` where what it does depends on the numbers in a tensor.
    """
    timings = timings or Timings()
    bare = on_meta(model)
    example = pytree.tree_map_only(Tensor, lambda leaf: leaf.to("meta"), example)
    args, kwargs = batch_for(bare, example, batch, seq)
    arguments = args, {name: value for name, value in kwargs.items() if example is not None or not name.endswith(MASK)}
    with timings.stage("frozen base"):
        base = floor(bare)
        rows = [_counted(base, arguments)]
    intentions = intend(spec)
    try:
        compiled = compile(bare, intentions, example=example, timings=timings)
    except NotImplementedError as error:  # what torch raises where numbers are asked for
        reason = f"it cannot be compiled without its weights ({headline(error)})"
        raise PeftcError(CannotMeasure(model=type(model).__name__, reason=reason)) from error
    if islands := compiled.plan.captured.islands:
        reason = f"{islands[0].path} runs its own code, whose operations no graph has"
        raise PeftcError(CannotMeasure(model=type(model).__name__, reason=reason))
    with timings.stage("peftc"):
        rows.append(_counted(Variant(FUSED, compiled), arguments))
    with timings.stage("HF PEFT"):
        rows.append(_counted(_hf_peft(bare, compiled), arguments))
    given = next(leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor))
    return Counts(
        model=type(model).__name__,
        spec="\n".join(row.statement for row in compiled.plan.rows),
        batch=given.shape[0],
        seq=given.shape[1] if not given.is_floating_point() and given.dim() > 1 else 0,
        dtype=compiled.dtype,
        rows=tuple(rows),
        card=card,
    )


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of all modules whose tensors have no memory; those that were one still are."""
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _counted(variant: Variant, arguments: Arguments) -> Counted:
    """One step, forward and backward."""
    if variant.module is None:
        return Counted(variant.name, note=variant.missing)
    meter = Meter()
    try:
        with OnCuda(), meter:
            variant.loss(arguments).backward()
    except PeftcError as error:
        if not variant.foreign:
            raise
        return Counted(variant.name, note=error.diagnostics[0].title)
    except Exception as error:  # a model is anybody's code
        if not variant.foreign:
            reason = f"it does not run on the meta device ({headline(error)})"
            raise PeftcError(CannotMeasure(model=type(variant.module).__name__, reason=reason)) from error
        return Counted(variant.name, note=headline(error))
    finally:
        variant.drop_gradients()
    return Counted(variant.name, meter.launches, meter.waits)


def _hf_peft(bare: nn.Module, compiled: CompiledModule) -> Variant:
    """HF PEFT's model of the same adapter, made by itself: its state has no numbers to be the same."""
    try:
        import peft
    except ImportError:
        return Variant(HF_PEFT, missing="peft is not installed")
    try:
        config, _ = exported(compiled)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, CONFIG).write_text(json.dumps(config))
            settings = peft.PeftConfig.from_pretrained(folder)
        settings.inference_mode = False
        theirs = peft.get_peft_model(on_meta(bare), settings)
    except PeftcError as error:
        return Variant(HF_PEFT, missing=error.diagnostics[0].title)
    except Exception as error:  # whatever another library may raise on a model it does not take
        return Variant(HF_PEFT, missing=f"peft {peft.__version__}: {headline(error)}")
    return Variant(HF_PEFT, theirs.train())
