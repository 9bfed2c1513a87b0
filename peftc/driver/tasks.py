"""The tasks of a compiled model: the tensors that each starts with, and the graphs that run them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftc.diagnostics.timings import Timings
from peftc.driver.planned import Again
from peftc.graph.ir import get_attribute, set_tensor, tensors
from peftc.graph.surroundings import ordinary_tensors
from peftc.planning.plan import Binding, Plan, of_task
from peftc.rewrite.state import begin, rewritten
from peftc.runtime.module import Runtime
from peftc.runtime.tasks import Face, Selected

Build = Callable[..., Runtime]


def start(
    module: nn.Module, plan: Plan, task: str, state: Mapping[str, Tensor] | None, data: Mapping[Binding, Any] | None
) -> None:
    """Puts into `module` what a task of `plan` keeps for itself, as it starts, or as `state` has it.

    Args:
        module: with what all tasks have in common.
        plan: of all.
        task: one of them.
        state: tensors by their names in the model.
        data: what calibration saw.
    """
    own = plan.tasks[task]
    scratch = nn.Module()
    for name, tensor in tensors(module).items():
        set_tensor(scratch, name, tensor)
    names = (*plan.own_tensors(task), *plan.own_trained(task))
    known = None if state is None else {name: state[of_task(task, name)] for name in names}
    begin(scratch, own, plan.own_bindings(task), plan.own_trained(task), known, data)
    for name in names:
        set_tensor(module, of_task(task, name), get_attribute(scratch, name))


def face(compiled: Runtime, selected: Selected, build: Build) -> Face:
    """A graph that runs what is selected, built of the graph that the model was captured as.

    Raises:
        PeftcError: `not-by-row` where tasks cannot be told apart by row.
    """
    wanted = compiled.plan.intentions
    if selected.off:
        intentions = wanted.off()
    elif selected.by_row:
        intentions = wanted.by_row(selected.tasks)
    else:
        intentions = wanted.task(selected.tasks[0])
    again = Again(compiled)
    with ordinary_tensors(), torch.random.fork_rng(), torch.autocast(compiled.device.type, enabled=False):
        plan = again.over_the_same_graph(intentions)
        own = _own(compiled.plan, plan, selected)
        other = {*plan.trained.keys() ^ compiled.plan.trained.keys(), *own}
        other |= set(rewritten(plan)) ^ set(rewritten(compiled.plan))
        common = compiled.tensors_in_common & (tensors(plan.captured.module).keys() | plan.tensors.keys()) - other
        names = Face(None, own, common).borrowed(selected.tasks)
        state = {
            name: again.at_home(get_attribute(compiled, names[name])) for name in (*plan.tensors, *plan.trained)
        }
        made = build(plan, Timings(), state, fuse=compiled.is_fused)
    made = made.to(compiled.device) if again.home != compiled.device else made
    return Face(made, own, common & tensors(made).keys())


def _own(plan: Plan, its: Plan, selected: Selected) -> dict[str, tuple[int, str]]:
    """A graph's names of what is the tasks' own -> which of them, and the name in that one's plan."""
    if selected.by_row:
        return its.by_row
    task = next(iter(selected.tasks), None)
    return {} if task is None else {name: (0, name) for name in (*plan.own_tensors(task), *plan.own_trained(task))}
