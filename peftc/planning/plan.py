"""What a spec comes to on a model: which method stands where, what learns, what lies packed, and what that costs.

A plan knows everything about the compiled model but its numbers. The planner makes it; all later stages read it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, KeysView, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from operator import attrgetter
from typing import Any

import torch

from peftc.capture.capture import Captured
from peftc.diagnostics.html import html_table
from peftc.diagnostics.source import Span
from peftc.graph.ir import get_attribute, value
from peftc.language import Spec
from peftc.planning.memory import Kept, Memory, formatted_bytes, step_memory
from peftc.planning.packed_weight import PackedWeight
from peftc.protocol.method import Method, State
from peftc.protocol.site import Sequence, Site
from peftc.protocol.sites import Sites
from peftc.spec.resolve import Intentions

TASK = "task"  # the module in which tensors of tasks lie, by the task's name


@dataclass(frozen=True, eq=False)
class Binding:
    """One method at one site. `path` is where the compiled model keeps its state; `shared` lies by `shared_names`."""

    statement: int
    method: Method
    site: Site
    path: str
    span: Span
    shared_names: dict[str, str] = field(default_factory=dict)
    shared: dict[str, State] = field(default_factory=dict)

    @cached_property
    def state(self) -> dict[str, State]:
        """The tensors the method keeps here."""
        return self.method.state(self.site)

    @cached_property
    def own_names(self) -> dict[str, str]:
        """The full name of each tensor the method keeps here."""
        return {name: f"{self.path}.{name}" for name in self.state}

    @cached_property
    def names(self) -> dict[str, str]:
        """The full name of each tensor the method has here, those it shares with other sites included."""
        return self.own_names | self.shared_names

    @cached_property
    def tensors(self) -> dict[str, State]:
        """Full name -> what `names` names."""
        specs = self.state | self.shared
        return {full: specs[name] for name, full in self.names.items()}


def of_task(task: str, name: str) -> str:
    """What the tensor that a task's own plan has as `name` is called in a model with several tasks."""
    return f"{TASK}.{task}.{name}"


def extension(bindings: Iterable[Binding]) -> int:
    """The positions that all prompts together add to the input."""
    return sum(b.method.lengthens(b.site) for b in bindings if isinstance(b.site, Sequence))


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of the compiled model: `size` bytes an element. `is_buffer`: where models lie in parts it is whole."""

    name: str
    shape: tuple[int, ...]
    size: int
    learns: bool = False
    is_buffer: bool = False

    @property
    def bytes(self) -> int:
        """What it takes."""
        return prod(self.shape) * self.size


@dataclass(frozen=True)
class StatementCost:
    """One line of the report: a statement, what it matched, what it costs."""

    statement: str
    sites: int
    parameters: int
    packed: int | None = None  # bytes that the packed weights take, of a statement that packs some
    dense: int = 0  # and what they take in the base model
    task: str | None = None  # whose statement it is; all have in common what is nobody's

    def told(self, total: int) -> tuple[str, str]:
        """How many parameters learn and their share of `total`; of packed weights the bytes, and of how many."""
        if self.packed is None:
            return f"{self.parameters:,}", f"{self.parameters / total:.4%}"
        return formatted_bytes(self.packed), f"of {formatted_bytes(self.dense)}"

    def to_json(self) -> dict[str, Any]:
        """The row as plain data."""
        row = {"statement": self.statement, "sites": self.sites, "parameters": self.parameters}
        row |= {} if self.task is None else {"task": self.task}
        return row if self.packed is None else row | {"bytes": self.packed, "dense_bytes": self.dense}


@dataclass(frozen=True)
class Fitted:
    """What was chosen for one `fit` statement: spec text, and in words what it comes to and costs."""

    statement: str
    span: Span
    chosen: tuple[str, ...]
    comes_to: str
    costs: str

    @property
    def told(self) -> str:
        """In one line, without the statements that it chose."""
        return "; ".join(filter(None, (self.comes_to, self.costs)))

    def to_json(self) -> dict[str, Any]:
        """All of it but the place."""
        return {
            "statement": self.statement, "chosen": list(self.chosen), "comes_to": self.comes_to, "costs": self.costs,
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a spec comes to on a model. Counts are exact; nothing has been allocated.

    `kept`: what autograd keeps for the backward pass, read off the graph as it was captured. `tasks`: what each task of
    the spec comes to, with what all of them have in common; that alone is in the other fields. `picture` draws it in
    HTML, for a notebook. `fitted`: what was chosen for each `fit`; the spec of the intentions has it written out.
    """

    intentions: Intentions
    captured: Captured
    sites: Sites
    bindings: tuple[Binding, ...]
    trained: dict[str, Span]
    rows: tuple[StatementCost, ...]
    packed: dict[str, PackedWeight] = field(default_factory=dict)
    recomputed: dict[str, Span] = field(default_factory=dict)
    kept: tuple[Kept, ...] = ()
    tasks: dict[str, Plan] = field(default_factory=dict)
    by_row: dict[str, tuple[int, str]] = field(default_factory=dict)
    picture: Callable[[Plan], str] | None = field(default=None, repr=False, compare=False)
    fitted: tuple[Fitted, ...] = ()

    @property
    def spec(self) -> Spec:
        """What was planned."""
        return self.intentions.spec

    @property
    def stored(self) -> dict[str, PackedWeight]:
        """`packed`, by the name that `to_json` has for it."""
        return self.packed

    @property
    def checkpoints(self) -> dict[str, Span]:
        """`recomputed`, by the name that `to_json` has for it."""
        return self.recomputed

    @property
    def trainable(self) -> int:
        """Parameters that learn, for all tasks: the methods' own and the existing ones a `train` statement names."""
        own = self._added(trainable=True) + sum(self.sites.parameters[name] for name in self.trained)
        return own + sum(task.trainable - own for task in self.tasks.values())

    @property
    def total(self) -> int:
        """All parameters of the compiled model, the frozen ones included, and each task's copies of those it trains."""
        own = sum(self.sites.parameters.values()) + self._added(trainable=True) + self._added(trainable=False)
        copies = (self.sites.parameters[name] for task in self.tasks for name in self.own_trained(task))
        return own + sum(task.total - own for task in self.tasks.values()) + sum(copies)

    def own_tensors(self, task: str) -> dict[str, State]:
        """What a task's methods keep, by its names in the task's plan, less what all tasks have in common."""
        return {name: state for name, state in self.tasks[task].tensors.items() if name not in self.tensors}

    def own_trained(self, task: str) -> list[str]:
        """The existing parameters that a task has a copy of its own of, to train it."""
        return [name for name in self.tasks[task].trained if name not in self.trained]

    @property
    def share(self) -> float:
        """`trainable` over `total`."""
        return self.trainable / self.total if self.total else 0.0

    def _added(self, *, trainable: bool) -> int:
        return sum(prod(state.shape) for state in self.tensors.values() if state.trainable is trainable)

    @cached_property
    def tensors(self) -> dict[str, State]:
        """Every tensor that the methods keep, by its full name; one that sites share is there once."""
        return {name: state for binding in self.bindings for name, state in binding.tensors.items()}

    def own_bindings(self, task: str) -> list[Binding]:
        """A task's bindings beyond those that all have in common, whose statements come first."""
        return [b for b in self.tasks[task].bindings if b.statement >= len(self.intentions.applications)]

    @cached_property
    def placed(self) -> tuple[tuple[Binding, dict[str, str]], ...]:
        """Every binding, those of tasks included, with the names of its tensors in the compiled model."""
        own = (
            (binding, {name: self._called(task, full) for name, full in binding.names.items()})
            for task in self.tasks
            for binding in self.own_bindings(task)
        )
        return (*((binding, binding.names) for binding in self.bindings), *own)

    def _called(self, task: str, name: str) -> str:
        return name if name in self.tensors else of_task(task, name)

    @cached_property
    def kinds(self) -> dict[str, Hashable]:
        """What tasks are alike in that differ in numbers alone, for each of them: one graph is for all that are."""
        return {task: self._kind(task) for task in self.tasks}

    def _kind(self, task: str) -> Hashable:
        bindings = tuple((repr(b.method), b.path, b.statement) for b in self.own_bindings(task))
        plan = self.tasks[task]
        packed = tuple((name, repr(i.storage)) for name, i in plan.packed.items() if name not in self.packed)
        return bindings, tuple(self.own_trained(task)), packed, tuple(plan.recomputed)

    @cached_property
    def added(self) -> KeysView[str]:
        """The full name of every tensor that is not simply the base model's, those of all tasks included, in order."""
        tasks = (of_task(t, name) for t in self.tasks for name in (*self.own_tensors(t), *self.own_trained(t)))
        return dict.fromkeys((*self.tensors, *self.trained, *tasks)).keys()

    @cached_property
    def consistency(self) -> float:
        """The weight of a consistency loss between two passes of each step; 0 where no method asks for one."""
        wanted = max((binding.method.consistency for binding in self.bindings), default=0.0)
        return wanted if self.captured.has_loss else 0.0

    @cached_property
    def input_values(self) -> tuple[torch.Tensor, ...]:
        """The fake values of the graph's inputs."""
        return tuple(node.meta["val"] for node in self.captured.module.graph.find_nodes(op="placeholder"))

    def memory(self, batch: int = 1, seq: int = 512, optimizer: str = "adamw") -> Memory:
        """Bytes of one training step by kind: weights, gradients, optimiser state, activations.

        Args:
            batch: examples in a step.
            seq: tokens in an example; without effect on models that take no tokens.
            optimizer: a key of `peftc.planning.memory.STATE_BYTES`.

        One task is trained at a time: of several it is the one that needs the most, beside the weights of all.
        """
        if self.tasks:
            common = replace(self, tasks={}).memory(batch, seq, optimizer).weights
            each = [task.memory(batch, seq, optimizer) for task in self.tasks.values()]
            most = max(each, key=attrgetter("total"))
            return replace(most, weights=common + sum(one.weights - common for one in each))
        held = list(self.held())
        known = self.sizes(batch, seq)
        return step_memory(
            sum(tensor.bytes for tensor in held),
            [(prod(tensor.shape), tensor.size) for tensor in held if tensor.learns],
            sum(kept.bytes(known) for kept in self.kept) * (2 if self.consistency else 1),
            optimizer,
        )

    def held(self) -> Iterator[Held]:
        """Every tensor of the compiled model, but for what graphs take for constant."""
        module = self.captured.module
        sizes = {name: item.dtype.itemsize for name, item in self.packed.items()}
        for name in self.sites.parameters:
            if (item := self.packed.get(name)) is not None:
                yield from (Held(full, b.shape, b.dtype.itemsize) for full, b in item.buffers.items())
                continue
            own = get_attribute(module, name)
            sizes[name] = own.element_size()
            yield Held(name, tuple(own.shape), own.element_size(), learns=name in self.trained)
        beside = {name: _beside(binding.site, sizes) for binding in self.bindings for name in binding.tensors}
        for name, state in self.tensors.items():
            size = state.dtype.itemsize if state.dtype else max(beside[name], 4)
            yield Held(name, tuple(state.shape), size, learns=state.trainable, is_buffer=not state.trainable)

    def sizes(self, batch: int, seq: int) -> dict[Any, int]:
        """The symbols of the inputs' dimensions: the first is the batch, the second counts tokens, prompts included."""
        known: dict[Any, int] = {}
        for fake in self.input_values:
            for size, given in zip(fake.shape, (batch, seq + extension(self.bindings)), strict=False):
                if isinstance(size, torch.SymInt):
                    known[size.node.expr] = given
        return known

    def _repr_html_(self) -> str:
        """The table of `peftc plan`, for a notebook, and the picture where the plan has one."""
        rows = [[row.statement, f"{row.sites:,}", *row.told(self.total)] for row in self.rows]
        title = f"{self.sites.model}: {self.total:,} parameters"
        every = ["all", "", f"{self.trainable:,}", f"{self.share:.4%}"]
        table = html_table(title, ("statement", "sites", "trainable", "share"), [*rows, every])
        return table + (self.picture(self) if self.picture else "")

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data; `fresh` and `unread`, as of `Differences`, where a checkpoint has such."""
        differences = {name: list(keys) for name, keys in vars(self.captured.differences).items() if keys}
        islands = [{"module": one.path, "where": one.where, "reason": one.reason} for one in self.captured.islands]
        return {
            "model": self.sites.model,
            "trainable": self.trainable,
            "total": self.total,
            "share": self.share,
            "statements": [row.to_json() for row in self.rows],
            "bindings": [
                {"method": repr(binding.method), "site": binding.site.name, "path": binding.path}
                for binding in self.bindings
            ],
            "trained": list(self.trained),
            "checkpoints": list(self.recomputed),
            "stored": [
                {"weight": item.weight, "storage": repr(item.storage), "path": item.path, "bytes": item.bytes}
                for item in self.packed.values()
            ],
            **({"islands": islands} if islands else {}),
            **({"fitted": [one.to_json() for one in self.fitted]} if self.fitted else {}),
            **differences,
            **({"tasks": {name: task.to_json() for name, task in self.tasks.items()}} if self.tasks else {}),
        }


def _beside(site: Site, sizes: Mapping[str, int]) -> int:
    """Bytes of a number of what state stands beside: the site's weight, or the value that changes where it has none."""
    return sizes[site.parameters[0]] if site.parameters else value(site.changes()[0]).element_size()
