"""The tasks of a compiled model: the tensors that each starts with, and the graphs that run them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftc import language as ast
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.timings import Timings
from peftc.driver.errors import BadTask, CannotCalibrate
from peftc.driver.planned import Again, misfit
from peftc.files import artifact
from peftc.files.artifact import flattened
from peftc.files.errors import BadArtifact
from peftc.files.hf_peft import folder as peft_folder
from peftc.graph.ir import get_attribute, set_tensor, tensors
from peftc.graph.surroundings import ordinary_tensors
from peftc.planning import planner
from peftc.planning.plan import TASK, Binding, Plan, of_task
from peftc.rewrite.state import begin, rewritten
from peftc.runtime.module import Runtime
from peftc.runtime.tasks import Face, Selected
from peftc.spec.check import as_spec
from peftc.spec.resolve import resolve
from peftc.spec.tasks import renamed, task_from, tasks_of, with_tasks, without_tasks

Build = Callable[..., Runtime]


def start(
    module: nn.Module, plan: Plan, task: str, state: Mapping[str, Tensor] | None, data: Mapping[Binding, Any] | None
) -> dict[str, Tensor]:
    """What a task of `plan` keeps for itself, by its names in the model: as it starts, or as `state` has it.

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
    return {of_task(task, name): get_attribute(scratch, name) for name in names}


def put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors in their places."""
    for name, tensor in tensors.items():
        set_tensor(module, name, tensor)


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
        state = {name: again.at_home(get_attribute(compiled, names[name])) for name in (*plan.tensors, *plan.trained)}
        made = build(plan, Timings(), state, fuse=compiled.is_fused)
    made = made.to(compiled.device) if again.home != compiled.device else made
    return Face(made, own, common & tensors(made).keys())


def _own(plan: Plan, its: Plan, selected: Selected) -> dict[str, tuple[int, str]]:
    """A graph's names of what is the tasks' own -> which of them, and the name in that one's plan."""
    if selected.by_row:
        return its.by_row
    task = next(iter(selected.tasks), None)
    return {} if task is None else {name: (0, name) for name in (*plan.own_tensors(task), *plan.own_trained(task))}


# Tasks that come and go


def add(compiled: Runtime, name: str, given: str | Path, instead: bool = False) -> None:
    """Adds a task to a compiled model, without capturing it again.

    Args:
        compiled: the model.
        name: of the task.
        given: the text of its statements, or a folder that a model with one task was saved to, or HF PEFT's.
        instead: take it in place of the one that has this name.

    Raises:
        PeftcError: `unknown-task` in place of none; else what `peftc.compile` says of statements, `peftc.load` of
            folders.
    """
    plan = compiled.plan
    if instead:
        compiled.known([name])
    with ordinary_tensors():
        text, state = _given(compiled, given)
        task, tasks = task_from(name, text), [*tasks_of(plan.spec.statements)]
        tasks = [task if other.name.text == name else other for other in tasks] if instead else [*tasks, task]
        wanted = resolve(with_tasks(plan.spec, tasks))
        one = replace(wanted, tasks={name: wanted.tasks[name]}, budgets=[])
        planned = Again(compiled).over_the_same_graph(one).tasks[name]
        wanting = {b.span: b.method.name for b in planned.bindings if b.method.data is not None and state is None}
        if wanting:
            raise PeftcError(*(CannotCalibrate(method=method, span=span) for span, method in wanting.items()))
        whole = planner.with_tasks(replace(plan, intentions=wanted), {**plan.tasks, name: planned})
        if problems := [*planner.over_budgets(whole)]:
            raise PeftcError(*problems)
        known = None if state is None else _own_state(compiled, whole, name, state)
        made = start(compiled, whole, name, known, None)
    if instead:
        _shelves(compiled).pop(name)
    put(compiled, made)
    _now(compiled, whole)
    compiled.prepare()  # a graph that has a frozen weight of the task's own, which another task of its kind had left
    compiled.face([name])


def remove(compiled: Runtime, name: str) -> None:
    """Takes a task out of a compiled model; where it was in use, what all have in common is.

    Raises:
        PeftcError: `unknown-task`.
    """
    compiled.known([name])
    tasks = [task for task in tasks_of(compiled.plan.spec.statements) if task.name.text != name]
    plans = {known: plan for known, plan in compiled.plan.tasks.items() if known != name}
    if compiled.in_use == name:
        compiled.use(None)
    _shelves(compiled).pop(name)
    _now(compiled, _with(compiled.plan, tasks, plans))


def rename(compiled: Runtime, name: str, new: str) -> None:
    """Gives a task of a compiled model another name.

    Raises:
        PeftcError: `unknown-task`; `name-taken`.
    """
    compiled.known([name])
    tasks = [renamed(t, new) if t.name.text == name else t for t in tasks_of(compiled.plan.spec.statements)]
    plans = {new if known == name else known: plan for known, plan in compiled.plan.tasks.items()}
    whole = _with(compiled.plan, tasks, plans)
    shelves = _shelves(compiled)
    shelves[new] = shelves.pop(name)
    if compiled.in_use == name:
        compiled.__dict__["selected"] = Selected((new,))
    _now(compiled, whole)


def _with(plan: Plan, tasks: list[ast.Task], plans: dict[str, Plan]) -> Plan:
    return planner.with_tasks(replace(plan, intentions=resolve(with_tasks(plan.spec, tasks))), plans)


def _shelves(compiled: Runtime) -> dict[str, Any]:
    """The modules that the tensors of tasks lie in, by the task's name."""
    shelves: dict[str, Any] = compiled.get_submodule(TASK)._modules
    return shelves


def _now(compiled: Runtime, plan: Plan) -> None:
    """Makes a plan that of a compiled model; graphs of tasks that are no more are let go."""
    compiled.__dict__["plan"] = plan
    compiled.settle()
    kinds = {compiled.kind(task) for task in plan.tasks}
    for key in [key for key in compiled.faces if not kinds.issuperset(key[0])]:
        del compiled.faces[key]


def _given(compiled: Runtime, given: str | Path) -> tuple[str, dict[str, Tensor] | None]:
    """The statements of a task's own, and its tensors by their names in a plan of its own where they are there."""
    if not os.path.isdir(given):  # which a text may be too long a name to be asked as a path
        return flattened(as_spec(given)), None
    folder = Path(given)
    if not (folder / artifact.MANIFEST).exists():
        adapter = peft_folder.read(compiled.base, folder)
        plan = Again(compiled).over_the_same_graph(resolve(adapter.spec))
        return flattened(adapter.spec), adapter.state(plan)
    found = artifact.read(folder)
    checkpoint = compiled.plan.captured.checkpoint
    found.check_base(compiled.base, checkpoint.digests if checkpoint is not None else None)
    if tasks := [task.name.text for task in tasks_of(found.spec.statements)]:
        reason = f"it has several tasks ({', '.join(tasks)}): save one of them by itself"
        raise PeftcError(BadArtifact(folder=str(folder), reason=reason))
    common = {ast.unparse(statement) for statement in without_tasks(compiled.plan.spec).statements}
    own = [text for statement in found.spec.statements if (text := ast.unparse(statement)) not in common]
    return "\n".join(own), found.state


def _own_state(compiled: Runtime, plan: Plan, task: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A task's tensors by their names in the model, of those by its own plan's; what all have in common is the same."""
    common = {name: get_attribute(compiled, name).detach() for name in (*plan.tensors, *plan.trained)}
    reason = misfit(plan.tasks[task], common | state)
    for name in common.keys() & state.keys():
        if not torch.equal(common[name].to("cpu"), state[name].to("cpu", common[name].dtype)):
            reason = reason or f"its {name} is not the one that all tasks have in common"
    if reason is not None:
        raise PeftcError(BadTask(task=task, reason=reason))
    return {of_task(task, name): tensor for name, tensor in state.items() if name not in common}
