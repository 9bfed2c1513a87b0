"""A model or a reference to one -> a plan over the loaded model.

A reference whose spec quantises something is planned on shapes first; then what stays dense is read, and the rest is
left in the checkpoint for the passes to read, pack and let go of, one weight at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from peftc.capture.capture import over
from peftc.capture.checkpoint import Checkpoint
from peftc.capture.inputs import Example
from peftc.capture.references import Reference, load_but, load_model, parse_reference
from peftc.diagnostics import debug
from peftc.diagnostics.timings import Timings
from peftc.driver import pipeline
from peftc.language.syntax import Spec
from peftc.planning.planner import Plan
from peftc.spec.resolve import resolve

# Of a model and the inputs that came with it: what to capture it with.
MakeExample = Callable[[nn.Module, Any], Example]


def load_and_plan(
    model: nn.Module | str | Path,
    spec: Spec,
    make_example: MakeExample,
    timings: Timings,
    *,
    dtype: str | None = None,
    whole: bool = False,
) -> Plan:
    """The plan of `spec` on a model whose weights can be read.

    Args:
        model: a module, or a reference.
        spec: what to plan.
        make_example: called on the module that is captured.
        timings: collects seconds by stage.
        dtype: of a reference's weights; the checkpoint's own by default.
        whole: read all weights before planning, because the model itself is to be run.

    Raises:
        PeftcError: as `load_model` and `pipeline.plan_model`.
    """
    module, given = model, None
    if not isinstance(module, nn.Module):
        reference = parse_reference(str(module))
        if resolve(spec).storings:
            plan = None if whole else _without_what_is_packed(reference, spec, make_example, timings, dtype)
            if plan is not None:
                return plan
            debug.tell(f"{reference.text} is read as a whole, and packed then")
        with timings.stage("load"):
            module, given = load_model(reference, dtype=dtype)
    return pipeline.plan_model(module, spec, make_example(module, given), timings)


def _without_what_is_packed(
    reference: Reference, spec: Spec, make_example: MakeExample, timings: Timings, dtype: str | None
) -> Plan | None:
    """The plan over a model whose packed weights were not read; None where only a whole checkpoint can be."""
    plans: list[Plan] = []

    def leave(skeleton: nn.Module) -> Iterable[str]:
        plans.append(pipeline.plan_model(skeleton, spec, make_example(skeleton, None), timings))
        reading.enter_context(timings.stage("load"))
        return plans[0].stored

    with ExitStack() as reading:
        found = load_but(reference, leave, dtype=dtype)
    if found is None:
        return None
    model, checkpoint = found
    if checkpoint is None:
        debug.tell(f"{reference.text} has no safetensors files: it was read as a whole")
        return pipeline.plan_model(model, spec, make_example(model, None), timings)
    (plan,) = plans
    _tell(checkpoint, len(plan.stored), timings)
    return replace(plan, captured=over(plan.captured, model, checkpoint))


def _tell(checkpoint: Checkpoint, count: int, timings: Timings) -> None:
    """Announces the weights as they are read."""
    read: set[str] = set()

    def tell(name: str) -> None:
        read.add(name)
        timings.progress(f"weight {len(read)} of {count}")

    checkpoint.on_read = tell
