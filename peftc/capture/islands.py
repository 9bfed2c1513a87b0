"""Modules that cannot be traced stay what they are: one node each in the graph, which calls the module's own code.

Which they are is asked of captures that fail: the innermost module that was running, and all of its class, become
islands, and the model is captured again. Where that does not do, as what it returns cannot be told, the module around
it is one; never the whole model, and none of torch's own.
"""

from __future__ import annotations

import copy
import linecache
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from transformers.exporters.utils import patch_attributes

from peftc.capture.gradients.functions import derivatives_tried
from peftc.capture.trials import NotToBeToldError, Recipe, Trials, leaf_of
from peftc.diagnostics import debug
from peftc.graph.ir import module_path, tensors
from peftc.graph.normalise import training_node
from peftc.kernels.island import STANDS_ALONE, Call, Island

TORCH = f"{Path(torch.__file__).parent}/"
MOST = 12  # classes of one model that are tried


@dataclass(frozen=True)
class Why:
    """Why a module is an island, and the line of its code where the capture found out."""

    reason: str
    where: str


class NoIslandError(Exception):
    """A module that was to be an island cannot be one."""

    def __init__(self, cls: type, reason: str) -> None:
        super().__init__(f"{cls.__name__} cannot be one operation: {reason}")
        self.cls, self.reason = cls, reason


@dataclass
class Islands:
    """Those of one model: all modules of `classes`. What is `refused` cannot be one, and why.

    `calls` and their sizes' `recipes` are found out once for `alike` ones. `fixing`: the modules that were running when
    a size of the inputs became a number, and the line that made it one.
    """

    model: nn.Module
    classes: dict[type, Why] = field(default_factory=dict)
    refused: dict[type, str] = field(default_factory=dict)
    calls: list[tuple[Call, tuple[Recipe, ...]]] = field(default_factory=list)
    alike: dict[Any, int] = field(default_factory=dict)
    skeletons: dict[str, nn.Module] = field(default_factory=dict)
    fixing: tuple[list[nn.Module], str] = ([], "")

    @contextmanager
    def standing(self) -> Iterator[None]:
        """While it is open an operation stands for each of them, and it is heard who makes a number of a size."""
        self.fixing = [], ""
        self.skeletons = dict(self._skeletons())
        patches: list[Any] = [(ShapeEnv, "evaluate_expr", self._listening)]
        for path in self.skeletons:
            module = self.model.get_submodule(path)
            instead = self._instead_of(path, module)
            patches.append((module, "forward", lambda _own, instead=instead: instead))
        with patch_attributes(patches), derivatives_tried():
            yield

    def _skeletons(self) -> Iterator[tuple[str, nn.Module]]:
        """A copy of each island without its weights, by its path; of those inside others none."""
        found: list[str] = []
        for path, module in self.model.named_modules():
            if type(module) in self.classes and not any(path.startswith(f"{other}.") for other in found):
                found.append(path)
                try:
                    yield path, skeleton_of(self.model, path)
                except Exception as error:  # copying is the code of whatever the module holds
                    raise NoIslandError(type(module), f"it cannot be copied: {error}") from error

    def _instead_of(self, path: str, module: nn.Module) -> Callable[..., Any]:
        skeleton, before = self.skeletons[path], tensors(module)
        names = names_of(skeleton)

        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            given: list[Tensor] = []
            numbers: list[Any] = []
            try:
                told = tuple(leaf_of(leaf, given, numbers) for leaf in leaves)
                trials = Trials(skeleton, {name: before[name] for name in names}, told, spec, given, numbers)
                kind = self._kind(type(module), trials)
            except NotToBeToldError as error:
                raise NoIslandError(type(module), str(error)) from error
            call, recipes = self.calls[kind]
            own = tensors(module)
            layouts = ";".join(map(str, call.layouts))
            made = STANDS_ALONE(kind, given, [own[name] for name in names], numbers, trials.sizes(recipes), layouts)
            return call.result(given, made)

        return forward

    def _kind(self, cls: type, trials: Trials) -> int:
        """The number of the call that this one is like."""
        key = cls, trials.looks()
        if key not in self.alike:
            self.calls.append(trials.call())
            self.alike[key] = len(self.calls) - 1
        return self.alike[key]

    def _listening(self, answer: Callable[..., sympy.Basic]) -> Callable[..., sympy.Basic]:
        """Shape environments answer as before; the first time that a symbol becomes a number it is noted where."""

        known: set[Any] = set()

        def evaluate_expr(env: ShapeEnv, asked: sympy.Basic, *args: Any, **kwargs: Any) -> sympy.Basic:
            said = answer(env, asked, *args, **kwargs)
            if not self.fixing[0] and (env, asked) not in known:
                known.add((env, asked))
                if asked.free_symbols and _fixes(asked, said):
                    self.fixing = self._running(_frames(sys._getframe(1)))
            return said

        return evaluate_expr

    def _running(self, frames: Iterable[FrameType]) -> tuple[list[nn.Module], str]:
        """The modules of the model that run in `frames`, the innermost first, and the line where that one is."""
        own = {id(module) for module in self.model.modules()}
        found: list[nn.Module] = []
        line = ""
        for frame in frames:
            module = frame.f_locals.get("self")
            if id(module) in own and isinstance(module, nn.Module) and module not in found:
                found.append(module)
                if not line and not frame.f_code.co_filename.startswith(TORCH):
                    line = place_of(frame.f_code.co_filename, frame.f_lineno)
        return found, line

    def placed(self, graph: fx.Graph) -> tuple[Island, ...]:
        """Puts the islands in the place of what stands for them, in a graph that has every block."""
        found: list[Island] = []
        for node in list(graph.find_nodes(op="call_function", target=STANDS_ALONE)):
            kind, given, own, numbers, sizes, _ = node.args
            path = module_path(node)
            skeleton, why = self.skeletons[path], self.classes[type(self.model.get_submodule(path))]
            island = Island(path, skeleton, names_of(skeleton), self.calls[kind][0], why.reason, why.where)
            with graph.inserting_before(node):
                made = graph.call_function(island, (training_node(graph), given, own, numbers, sizes))
            made.meta = dict(node.meta)
            node.replace_all_uses_with(made)
            graph.erase_node(node)
            found.append(island)
        return tuple(found)

    def widened(self, error: BaseException, why: Why, inside: Iterable[str] = ()) -> bool:
        """Whether there is another class of islands to capture the model with, after this `error`.

        Args:
            error: what the capture ended in.
            why: what it said, and at which line.
            inside: the paths of the modules that it is about, the innermost first, where the graph says it.
        """
        stacks = [[self.model.get_submodule(path) for path in inside]]
        for one in _chain(error):
            if isinstance(one, NoIslandError):
                self.refused[one.cls] = one.reason
                why = self.classes.pop(one.cls, why)
            stacks.append(self._running(_raised_in(one))[0])
        stack, line = max(stacks, key=len), why.where
        if not stack:
            stack, line = self.fixing
            why = Why("Python goes by the size of its input", line)
        for module in stack:
            cls = type(module)
            tried = cls in self.classes or cls in self.refused or cls.__module__.partition(".")[0] == "torch"
            if not tried and cls is not type(self.model) and len(self.classes) + len(self.refused) < MOST:
                self.classes[cls] = why
                debug.tell(1, [f"{cls.__name__} runs its own code: {why.reason} ({line})"])
                return True
        return False


def skeleton_of(model: nn.Module, path: str) -> nn.Module:
    """A copy of the module at `path` without any weight of the model, or gradient of what it remembers of a forward."""
    known: dict[int, Any] = {id(tensor): _without_numbers(tensor) for tensor in tensors(model).values()}
    module = model.get_submodule(path)
    skeleton = copy.deepcopy(module, known | remembered(module))
    for hooks in (skeleton._forward_hooks, skeleton._forward_pre_hooks):
        hooks.clear()  # those of the module itself are in the graph
    return skeleton


def remembered(module: nn.Module) -> dict[int, Any]:
    """What modules keep of a forward with its gradient, such as a state, for `copy.deepcopy`: without."""
    held = (value for part in module.modules() for value in vars(part).values())
    return {id(value): value.detach().clone() for value in held if isinstance(value, Tensor) and value.requires_grad}


def names_of(skeleton: nn.Module) -> tuple[str, ...]:
    """The parameters and buffers of a module, a tied one under its first name."""
    return tuple(name for name, _ in (*skeleton.named_parameters(), *skeleton.named_buffers()))


def place_of(file: str, line: int) -> str:
    """A line of code as a reader finds it, without the folder."""
    return f"{Path(file).name}:{line}: {linecache.getline(file, line).strip()}"


def _without_numbers(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _fixes(asked: sympy.Basic, said: sympy.Basic) -> bool:
    """Whether a symbol is a number after this answer."""
    holds = {sympy.true: asked, sympy.false: sympy.Not(asked)}.get(said, sympy.Eq(asked, said))
    sides = holds.args if isinstance(holds, sympy.Eq) else ()
    return any(side.is_Symbol for side in sides) and any(side.is_number for side in sides)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all that it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _raised_in(error: BaseException) -> list[FrameType]:
    """The frames that an error came through, the innermost first."""
    trace, found = error.__traceback__, []
    while trace is not None:
        found.append(trace.tb_frame)
        trace = trace.tb_next
    return found[::-1]


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
