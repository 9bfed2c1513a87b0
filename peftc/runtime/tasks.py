"""One compiled model, several tasks: which of them a call runs, and with what graph.

Every tensor lies in the compiled model, those of a task under `task.NAME`. Its own graph has what all tasks have in
common. Tasks that differ in numbers alone share another graph, a face of the model, which is lent their tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.ir import get_attribute, set_tensor, tensors
from peftc.planning.plan import of_task
from peftc.rewrite.splicer import TASK_ROWS
from peftc.rewrite.state import prepare, rewritten
from peftc.runtime.asked import LOCK, Asked, recompute
from peftc.runtime.errors import NotWhenTraced, UnknownTask

HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name and "state_dict" not in name)
Key = tuple[tuple[Hashable, ...], bool, bool]  # the kinds of tasks, whether off, whether by row


@dataclass(frozen=True)
class Selected:
    """What a call runs beside what all tasks have in common: nothing, a task, or one for each row of a batch.

    `off`: not even what they have in common, but how weights are stored. `tasks`: of a graph by rows, those that it has
    places for, each as often as it has.
    """

    tasks: tuple[str, ...] = ()
    off: bool = False
    by_row: bool = False


@dataclass(frozen=True)
class Face:
    """A graph for some tasks. `own`: its names of what is theirs -> which of them, and the name in that one's plan."""

    module: Any
    own: Mapping[str, tuple[int, str]]
    common: frozenset[str]

    def borrowed(self, tasks: Sequence[str]) -> dict[str, str]:
        """Its names of tensors -> what the model that lends them calls them."""
        own = {name: of_task(tasks[place], theirs) for name, (place, theirs) in self.own.items()}
        return own | {name: name for name in self.common}


class Switching(Asked):
    """A compiled model as far as it has several tasks."""

    faces: dict[Key, Face]
    selected: Selected
    make_face: Callable[[Any, Selected], Face] | None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of all tasks."""
        return tuple(self.plan.tasks)

    @property
    def in_use(self) -> str | None:
        """The task that a call runs, unless it says otherwise."""
        return self.selected.tasks[0] if self.selected.tasks else None

    def use(self, task: str | None) -> Self:
        """From now on a call runs this task; None: only what all tasks have in common.

        Raises:
            PeftcError: `unknown-task`.
        """
        self.known([task])
        self.__dict__["selected"] = Selected() if task is None else Selected((task,))
        self.face()
        return self

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, a call runs the base model: with its weights stored as the spec says, and nothing else of it."""
        before = self.selected
        self.__dict__["selected"] = Selected(off=True)
        try:
            yield
        finally:
            self.__dict__["selected"] = before

    disable_adapter = disabled  # what HF PEFT calls it

    def face(self, tasks: Sequence[str | None] | None = None) -> Any:
        """What runs a call: this model, or a graph for other tasks with this model's tensors in it.

        Args:
            tasks: the task of each row of a batch; the one in use for all by default.

        Raises:
            PeftcError: `unknown-task`; `not-by-row` where tasks cannot be told apart by row.
        """
        rows: tuple[int, ...] = ()
        if tasks is None:
            selected = self.selected
        else:
            self.known(tasks)
            selected, rows = self._by_row(tuple(tasks))
        if selected == Selected():
            return self
        key: Key = (tuple(map(self.kind, selected.tasks)), selected.off, selected.by_row)
        if torch.compiler.is_compiling():
            if key not in self.faces or selected.by_row:
                raise PeftcError(NotWhenTraced())
            return self.faces[key].module
        with LOCK:
            if key not in self.faces:
                assert self.make_face is not None
                self.faces[key] = self.make_face(self, selected)
            face = self.faces[key]
            self.lend(face.module, face.borrowed(selected.tasks))
        if selected.by_row:
            set_tensor(face.module, TASK_ROWS, torch.tensor(rows, device=self.device))
        return face.module

    @contextmanager
    def lying_together(self, tasks: Sequence[str | None] | None) -> Iterator[None]:
        """Inside, the tensors of all tasks of a kind lie name by name in one piece of memory, to be read by row without
        a copy; after it each has its own again, as who saves a model takes one piece for one tensor.

        Args:
            tasks: those of a batch; of others there is nothing to do.

        Raises:
            PeftcError: `unknown-task`.
        """
        self.known(tasks or ())
        kinds = {self.kind(task) for task in tasks or () if task is not None} if len(set(tasks or ())) > 1 else set()
        moved: list[Tensor] = []
        try:
            with torch.inference_mode(False), torch.no_grad():
                for kind in kinds:
                    members = [task for task in self.plan.tasks if self.kind(task) == kind]
                    for name in self.plan.own_tensors(members[0]) if len(members) > 1 else ():
                        moved += _in_one_piece([get_attribute(self, of_task(task, name)) for task in members])
            yield
        finally:
            with torch.inference_mode(False), torch.no_grad():
                for tensor in moved:
                    tensor.data = tensor.detach().clone()

    @torch.no_grad()
    def prepare(self) -> None:
        """Writes the frozen weights that methods take a part out of, by the state as it is now."""
        prepare(self, self.plan)
        for task, plan in self.plan.tasks.items():
            if set(rewritten(plan)) - set(rewritten(self.plan)):
                face = self.face([task])
                prepare(face, face.plan)

    def lend(self, other: nn.Module, names: Mapping[str, str]) -> None:
        """Gives `other` this one's tensors, by its names -> those of this one; and modes and hooks."""
        theirs = tensors(other)
        for name, mine in names.items():
            if theirs[name] is not (tensor := get_attribute(self, mine)):
                set_tensor(other, name, tensor)
        other.__dict__["logits_in_training"] = self.logits_in_training
        if other.__dict__["recomputes_every"] != self.recomputes_every:
            recompute(cast(Asked, other), self.recomputes_every)
        modules = dict(self.named_modules())
        for path, module in other.named_modules():
            if path in modules:
                module.training = modules[path].training
            if path in modules and path:  # of the whole the caller's own call runs them
                module.__dict__.update({name: modules[path].__dict__[name] for name in HOOKS})

    def known(self, tasks: Sequence[str | None]) -> None:
        """Raises PeftcError `unknown-task` where one of them is none."""
        for task in tasks:
            if task is not None and task not in self.plan.tasks:
                raise PeftcError(UnknownTask(name=str(task), known=self.tasks))

    def kind(self, task: str) -> Hashable:
        """What tasks are alike in that one graph is for, with other tensors."""
        plan = self.plan.tasks[task]
        writes = set(rewritten(plan)) - set(rewritten(self.plan))  # a frozen weight of its own
        return self.plan.kinds[task], task if writes else None

    def _by_row(self, tasks: tuple[str | None, ...]) -> tuple[Selected, tuple[int, ...]]:
        """What runs these tasks, and the place in it of each row's. Places of one kind are 1, 2, 4, 8, …"""
        asked = [task for task in self.plan.tasks if task in tasks]
        if len(set(tasks)) <= 1:
            return Selected(tuple(asked)), ()
        count = Counter(map(self.kind, asked))
        places = list(chain.from_iterable(
            _filled([task for task in asked if self.kind(task) == kind]) for kind in sorted(count, key=repr)
        ))  # fmt: skip
        rows = tuple(-1 if task is None else places.index(task) for task in tasks)
        return Selected(tuple(places), by_row=True), rows


def _filled(tasks: list[str]) -> list[str]:
    """As many as a power of two, the last one again and again."""
    return tasks + [tasks[-1]] * ((1 << (len(tasks) - 1).bit_length()) - len(tasks))


def _in_one_piece(tensors: list[Tensor]) -> list[Tensor]:
    """Moves tensors of one kind behind each other, each the same object as before; returns what was moved."""
    alike = {(type(tensor.data), tensor.shape, tensor.dtype, tensor.device) for tensor in tensors}
    if len(alike) > 1 or not all(tensor.is_contiguous() and not tensor.is_shared() for tensor in tensors):
        return []
    for tensor, part in zip(tensors, torch.stack([tensor.detach() for tensor in tensors]), strict=True):
        tensor.data = part
    return tensors
