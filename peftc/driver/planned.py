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
from peftc.driver.passes import CAPTURE
from peftc.graph.ir import aliases_of, copied, flat, get_attribute, keep_unread, set_tensor, tensors, value
from peftc.graph.surroundings import uncollected
from peftc.planning.plan import Plan, of_task
from peftc.planning.planner import make_plan
from peftc.rewrite.state import rewritten
from peftc.roles.assign import find_sites
from peftc.runtime.module import Runtime
from peftc.spec.resolve import Intentions


@uncollected()
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
        plan = plan_model(self.model, compiled.plan.intentions.common(), example, Timings())
        if not _alike(plan, compiled.plan):
            return None
        return self._over_what_is_there(plan)

    def over_the_same_graph(self, intentions: Intentions) -> Plan:
        """The plan of something else on the graph that the model was captured as, of which it is a copy."""
        compiled = self.compiled
        graph, _ = copied(compiled.history[CAPTURE])
        own = tensors(self.model)
        there = {name: own[name] for name in tensors(compiled) if name in own and not own[name].is_meta}
        for node in graph.find_nodes(op="get_attr"):
            name = str(node.target)
            found = own[name] if name in own else self.at_home(get_attribute(compiled, name))
            if not isinstance(found, bool):  # whether it is training
                there[name] = value(node) if getattr(found, "is_meta", False) else found  # it lies in a checkpoint
        root = aliases_of(there)
        module = flat(root, graph, class_name=compiled.plan.sites.model)
        keep_unread(root, module)  # graphs of other inputs may read it
        again = replace(compiled.plan.captured, module=module)
        return self._over_what_is_there(make_plan(again, find_sites(again), intentions))

    def _over_what_is_there(self, plan: Plan) -> Plan:
        """A plan on the base's own weights, and on those that are packed already as the plan has them."""
        compiled = self.compiled
        if (checkpoint := compiled.plan.captured.checkpoint) is not None:
            plan = replace(plan, captured=over(plan.captured, compiled.base, checkpoint))
        written = {*rewritten(plan)} ^ {*rewritten(compiled.plan)}
        for name, item in plan.packed.items():
            if name in compiled.plan.packed and name not in written:
                for full in item.buffers:
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


def misfit(plan: Plan, state: Mapping[str, Tensor]) -> str | None:
    """Why tensors of a file, by full name, are not what a plan has: one too many or too few, or of another kind."""
    own = {name: (plan, name) for name in (*plan.tensors, *plan.trained)}
    own |= {
        of_task(task, name): (plan.tasks[task], name)
        for task in plan.tasks
        for name in (*plan.own_tensors(task), *plan.own_trained(task))
    }
    planned = {full: _shape(its, name) for full, (its, name) in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if odd := sorted({name for name, _ in found.items() ^ planned.items()}):
        return odd[0]
    reasons = ((name, _misfit(tensor, *own[name])) for name, tensor in state.items())
    return next((f"{name} {reason}" for name, reason in reasons if reason), None)


def _shape(plan: Plan, name: str) -> tuple[int, ...]:
    spec = plan.tensors.get(name)
    return tuple(get_attribute(plan.captured.module, name).shape) if spec is None else spec.shape


def _misfit(tensor: Tensor, plan: Plan, name: str) -> str | None:
    """Why a tensor of a file cannot be what the plan has under its name: it has other numbers, or is no place there.

    What a method learns may have been saved in another precision; a parameter of the base has that of the base.
    """
    spec = plan.tensors.get(name)
    wanted = get_attribute(plan.captured.module, name).dtype if spec is None else spec.dtype
    if spec is not None and (wanted is None or wanted.is_floating_point):
        if not tensor.is_floating_point():
            return f"is {tensor.dtype}"
    elif tensor.dtype != wanted:
        return f"is {tensor.dtype}, where {wanted} is wanted"
    if spec is not None and spec.below is not None and not bool(((tensor >= 0) & (tensor < spec.below)).all()):
        return f"has an index out of range: there are {spec.below:,} to choose from"
    return None
