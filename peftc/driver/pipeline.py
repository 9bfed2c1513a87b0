"""The one visible list of stages, from a model and a spec to a trainable module.

    model -> capture -> sites -+
                               +-> plan -> [ calibrate ] -> PASSES -> fold -> CompiledModule
    spec -> intentions --------+

The model that a reference names is loaded before (`loading.py`); a step of the compiled module starts in
`peftc/runtime/module.py` and runs one of `entries.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from peftc.capture.capture import capture, over
from peftc.capture.checkpoints.streaming import weightless
from peftc.capture.inputs import Example
from peftc.diagnostics import debug
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.timings import Timings
from peftc.driver import calibration
from peftc.driver.compiled import CompiledModule
from peftc.driver.passes import PASSES, Pass, Work, run
from peftc.graph.ir import get_attribute, set_tensor
from peftc.graph.surroundings import ordinary_tensors
from peftc.optimise.fold import fold_blocks
from peftc.optimise.regions import BlockModule, mark
from peftc.planning.plan import Binding, Plan
from peftc.planning.planner import make_plan
from peftc.protocol.method import Data
from peftc.roles.assign import find_sites
from peftc.runtime.module import Runtime
from peftc.spec.resolve import Intentions

# Where nothing is to be fused the last pass leaves everything as it is.
UNFUSED = (*PASSES[:-1], replace(PASSES[-1], run=lambda _work: ()))


@dataclass(frozen=True)
class Graphs:
    """What passes made of the graph of a plan: the flat graph after each, in their order, the captured one first."""

    plan: Plan
    history: dict[str, fx.Graph]


def plan_model(model: nn.Module, intentions: Intentions, example: Example, timings: Timings) -> Plan:
    """The stages that need shapes only; they run as well on the meta device."""
    captured = capture(model, example, timings)
    with timings.stage("sites"):
        sites = find_sites(captured)
    with timings.stage("plan"):
        return make_plan(captured, sites, intentions)


def calibrate(plan: Plan, batches: list[Any], timings: Timings) -> dict[Binding, Any]:
    """What the plan's methods see of `batches`: the model runs once over them for each kind of question."""
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
    state: dict[str, Tensor] | None = None,
    data: Mapping[Binding, Any] | None = None,
    fuse: bool = True,
) -> CompiledModule:
    """Runs the passes over the plan's own graph, which it uses up, and emits the module.

    `state` (full name -> tensor) replaces initialisation: an artifact's tensors. `data` is what calibration saw.
    Without `fuse` the graph runs as the passes that insert wrote it: the oracle of what comes behind them.

    Raises:
        PeftcError: `used-plan` for a plan that was built before; `verifier-failed` where a pass is wrong.
    """
    work = _begun(plan, state=state, data=data)
    history = list(run(work, PASSES if fuse else UNFUSED, timings))
    with timings.stage("fold"):
        outer = fold_blocks(work.module, plan.sites.blocks, BlockModule if fuse else fx.GraphModule)
        if fuse:
            mark(work.module, plan.recomputed)
    with timings.stage("emit"):
        compiled = CompiledModule(work.module, outer, plan, history, work.given["fired"] if fuse else None)
    compiled.__dict__["capture_again"] = captured_again
    return compiled


def captured_again(compiled: Runtime, given: Mapping[str, Any]) -> CompiledModule | None:
    """The same model with a graph for the sizes of other inputs; its tensors are to be put in place by the caller.

    Args:
        compiled: built from the same plan.
        given: inputs by name, for whose sizes its graph is not.

    Returns:
        None where the model cannot be captured with them, or where the spec would mean something else there.
    """
    base, checkpoint = compiled.base, compiled.plan.captured.checkpoint
    model = base if checkpoint is None else weightless(cast(PreTrainedModel, base), checkpoint)
    home = next((tensor.device for tensor in model.parameters()), compiled.device)
    seen = {name: _at_home(value, home) for name, value in compiled.size_check.seen(given).items()}
    with ordinary_tensors(), torch.random.fork_rng(), torch.autocast(compiled.device.type, enabled=False):
        for example in compiled.plan.captured.example.like(seen):
            try:
                plan = plan_model(model, compiled.plan.intentions, example, Timings())
                if not _alike(plan, compiled.plan):
                    continue
                if checkpoint is not None:
                    plan = replace(plan, captured=over(plan.captured, base, checkpoint))
                for full in (full for item in plan.packed.values() for full in item.buffers):
                    set_tensor(plan.captured.module, full, _at_home(get_attribute(compiled, full), home))
                names = (*plan.tensors, *plan.trained)
                state = {name: _at_home(get_attribute(compiled, name), home) for name in names}
                other = build(plan, Timings(), state, fuse=compiled.is_fused)
            except PeftcError as error:
                debug.tell(1, [f"not captured for other sizes: {error}"])
                continue
            if other.size_check.refusal(given) is None:
                return other.to(compiled.device) if home != compiled.device else other
    return None


def _at_home(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _alike(one: Plan, other: Plan) -> bool:
    """Whether two plans of a spec come to the same tensors: on another side of a branch there may be other sites."""
    return all(
        found.keys() == wanted.keys()
        for found, wanted in ((one.tensors, other.tensors), (one.trained, other.trained), (one.packed, other.packed))
    )


def _begun(plan: Plan, **known: Any) -> Work:
    """The work on a plan, and in words what it is to do where."""
    work = Work.on(plan, **known)
    debug.tell(2, (f"{binding.method!r} -> {binding.site.name}  ({binding.span})" for binding in plan.bindings))
    return work
