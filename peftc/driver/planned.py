"""A model and what a spec wants of it -> a plan; and the plan of a compiled model again, captured in another way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftc.capture.capture import capture, over
from peftc.capture.checkpoints.streaming import weightless
from peftc.capture.inputs import Example
from peftc.diagnostics.timings import Timings
from peftc.graph.ir import get_attribute, set_tensor
from peftc.planning.plan import Plan
from peftc.planning.planner import make_plan
from peftc.roles.assign import find_sites
from peftc.runtime.module import Runtime
from peftc.spec.resolve import Intentions


def plan_model(model: nn.Module, intentions: Intentions, example: Example, timings: Timings) -> Plan:
    """The stages that need shapes only; they run as well on the meta device."""
    captured = capture(model, example, timings)
    with timings.stage("sites"):
        sites = find_sites(captured)
    with timings.stage("plan"):
        return make_plan(captured, sites, intentions)


class Again:
    """Captures of a compiled model's base in other ways."""

    def __init__(self, compiled: Runtime) -> None:
        """`compiled` gives the spec, the base, and the numbers of what was added."""
        self.compiled = compiled
        checkpoint = compiled.plan.captured.checkpoint
        base = compiled.base
        self.model = base if checkpoint is None else weightless(cast(PreTrainedModel, base), checkpoint)
        self.home = next((tensor.device for tensor in self.model.parameters()), compiled.device)

    def plan(self, example: Example) -> Plan | None:
        """The plan on another example; None where the spec would mean something else there.

        Raises:
            PeftcError: where the model cannot be captured with it.
        """
        compiled = self.compiled
        plan = plan_model(self.model, replace(compiled.plan.intentions, budgets=[]), example, Timings())
        if not _alike(plan, compiled.plan):
            return None
        if (checkpoint := compiled.plan.captured.checkpoint) is not None:
            plan = replace(plan, captured=over(plan.captured, compiled.base, checkpoint))
        for full in (full for item in plan.packed.values() for full in item.buffers):
            set_tensor(plan.captured.module, full, self.at_home(get_attribute(compiled, full)))
        return plan

    def state(self, plan: Plan) -> Mapping[str, Tensor]:
        """What was added to the base and what learns, as it is now."""
        return {name: self.at_home(get_attribute(self.compiled, name)) for name in (*plan.tensors, *plan.trained)}

    def at_home(self, value: Any) -> Any:
        """A value where the base is."""
        return value.to(self.home) if isinstance(value, torch.Tensor) else value


def _alike(one: Plan, other: Plan) -> bool:
    """Whether two plans of a spec come to the same tensors: on another side of a branch there may be other sites."""
    return (
        {name: tensor.shape for name, tensor in one.tensors.items()}
        == {name: tensor.shape for name, tensor in other.tensors.items()}
        and one.trained.keys() == other.trained.keys()
        and one.packed.keys() == other.packed.keys()
    )
