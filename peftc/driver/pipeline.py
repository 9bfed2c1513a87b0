"""The one visible list of stages, from a model and a spec to a trainable module.

    model -> capture -> sites -+
                               +-> plan -> [ calibrate ] -> PASSES -> fold -> CompiledModule
    spec -> intentions --------+

The model that a reference names is loaded before (`loading.py`); a step of the compiled module starts in
`peftc/runtime/module.py` and runs one of `entries.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from peftc.diagnostics import debug
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.timings import Timings
from peftc.driver import calibration
from peftc.driver.compiled import CompiledModule
from peftc.driver.decoding import decoder
from peftc.driver.passes import PASSES, UNFUSED, Pass, Work, run
from peftc.driver.planned import Again, plan_model
from peftc.driver.tasks import face, put, start
from peftc.graph.surroundings import ordinary_tensors
from peftc.optimise.fold import fold_blocks
from peftc.optimise.regions import BlockModule, mark
from peftc.planning.plan import Binding, Plan
from peftc.protocol.method import Data
from peftc.runtime.module import Runtime


@dataclass(frozen=True)
class Graphs:
    """What passes made of the graph of a plan: the flat graph after each, in their order, the captured one first."""

    plan: Plan
    history: dict[str, fx.Graph]


def calibrate(plan: Plan, batches: list[Any], timings: Timings) -> dict[Binding, Any]:
    """What the plan's methods see of `batches`, and its tasks': the model runs over them for each kind of question."""
    seen = {} if plan.tasks and not plan.bindings else _calibrated(plan, batches, timings)
    for task in plan.tasks:
        if any(binding.method.data is not None for binding in plan.own_bindings(task)):
            seen |= _calibrated(plan.tasks[task], batches, timings)
    return seen


def _calibrated(plan: Plan, batches: list[Any], timings: Timings) -> dict[Binding, Any]:
    with timings.stage("calibration"):
        data = calibration.observed(plan, batches)
        if not calibration.wants_state_gradients(plan):
            return data
        captured = plan.captured
        twin = plan_model(captured.model, plan.intentions, captured.example, Timings())
        compiled = build(calibration.probing(twin), Timings())
        compiled.__dict__["capture_again"] = None  # of the spec, which has no probes
        wanting = [binding for binding in plan.bindings if binding.method.data is Data.STATE_GRADIENTS]
        return data | dict(zip(wanting, calibration.probed(compiled, batches), strict=True))


def graphs(plan: Plan, passes: Sequence[Pass], timings: Timings) -> Graphs:
    """Runs some passes over the plan's own graph, which it uses up, and nothing behind them.

    Raises:
        PeftcError: as `build`.
    """
    return Graphs(plan, dict(run(_begun(plan), passes, timings)))


def build(
    plan: Plan,
    timings: Timings,
    state: Mapping[str, Tensor] | None = None,
    data: Mapping[Binding, Any] | None = None,
    fuse: bool = True,
    unread: bool = False,
) -> CompiledModule:
    """Runs the passes over the plan's own graph, which it uses up, and emits the module.

    `state` (full name -> tensor) replaces initialisation: an artifact's tensors. `data` is what calibration saw.
    Without `fuse` the graph runs as the passes that insert wrote it: the oracle of what comes behind them. `unread`:
    the frozen weights are left in their checkpoint, and what stands for them has to be replaced before a step.

    Raises:
        PeftcError: `used-plan` for a plan that was built before; `verifier-failed` where a pass is wrong.
    """
    work = _begun(plan, state=state, data=data, unread=unread)
    history = list(run(work, PASSES if fuse else UNFUSED, timings))
    for task in plan.tasks:
        with timings.stage("tasks"):
            put(work.module, start(work.module, plan, task, state, data))
    with timings.stage("fold"):
        outer = fold_blocks(work.module, plan.sites.blocks, BlockModule if fuse else fx.GraphModule)
        if fuse:
            mark(work.module, plan.recomputed)
    with timings.stage("emit"):
        compiled = CompiledModule(work.module, outer, plan, history, work.given["fired"] if fuse else None)
    make_face = partial(face, build=build)
    compiled.__dict__.update(capture_again=captured_again, make_continuation=decoder, make_face=make_face)
    for task in reversed(plan.tasks):  # the first one is in use
        with timings.stage("tasks"):
            compiled.use(task)
    return compiled


def captured_again(compiled: Runtime, given: Mapping[str, Any]) -> CompiledModule | None:
    """The same model with a graph for the sizes of other inputs; its tensors are to be put in place by the caller.

    Args:
        compiled: built from the same plan.
        given: inputs by name, for whose sizes its graph is not.

    Returns:
        None where the model cannot be captured with them, or where the spec would mean something else there.
    """
    again = Again(compiled)
    seen = {name: again.at_home(value) for name, value in compiled.size_check.seen(given).items()}
    with ordinary_tensors(), torch.random.fork_rng(), torch.autocast(compiled.device.type, enabled=False):
        for example in compiled.plan.captured.example.like(seen):
            try:
                if (plan := again.plan(example)) is None:
                    continue
                other = build(plan, Timings(), again.state(plan), fuse=compiled.is_fused)
            except PeftcError as error:
                debug.tell(1, [f"not captured for other sizes: {error}"])
                continue
            if other.runs(given):
                return other.to(compiled.device) if again.home != compiled.device else other
    return None


def _begun(plan: Plan, **known: Any) -> Work:
    """The work on a plan, and in words what it is to do where."""
    work = Work.on(plan, **known)
    debug.tell(2, (f"{binding.method!r} -> {binding.site.name}  ({binding.span})" for binding in plan.bindings))
    return work
