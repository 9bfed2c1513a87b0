"""A block as autograd sees it: one function, whose two passes were planned together.

Without gradients, and where it cannot be one function, a block runs its graph as it is written. Under `torch.compile`
it does, too, and says what is worth keeping (partition.py): the cut is the compiler's.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.source import Span
from peftc.graph.ir import get_attribute, is_mutable, is_tensor
from peftc.kernels.common.operation import autocast_dtype, first_derivative
from peftc.kernels.island import islands
from peftc.optimise.errors import CannotCheckpoint
from peftc.optimise.joint import Joint, Lifted, joint, lifted
from peftc.optimise.on_cpu import on_cpu
from peftc.optimise.partition import partitioned
from peftc.optimise.two_passes import Passes, split

MOST = 256  # programs that are remembered: a model has a few kinds of blocks
RECOMPUTED = "peftc recomputed"
LOCK = threading.RLock()


@dataclass(frozen=True, eq=False)
class Program:
    """The two passes of a kind of block as functions, and what they were made of."""

    forward: Callable[..., tuple[Any, ...]]
    backward: Callable[..., tuple[Tensor | None, ...]]
    passes: Passes
    outputs: int
    differentiable: tuple[int, ...]
    needs: tuple[bool, ...]


@dataclass(frozen=True)
class Kind:
    """What a program depends on; equal kinds share one. `text` says all that matters of the graph.

    `modes` are the caller's modes for functions, which a trace goes through.
    """

    text: str
    needs: tuple[bool, ...]
    constants: tuple[Any, ...]
    device: torch.device
    autocast: tuple[str, torch.dtype] | None
    recompute_all: bool
    modes: tuple[type, ...] = ()


class BlockModule(fx.GraphModule):
    """A block of the compiled model. Its graph is what it computes; how a training step runs it is planned apart.

    `meta[RECOMPUTED]`: its backward pass computes all of it again. What has an island stays on autograd.
    """

    _lifted: dict[bool, tuple[Lifted, str] | None]
    _in_place: bool
    _has_island: bool

    def recompile(self) -> Any:
        """GraphModule's, and a forward that chooses between the graph itself and the planned passes."""
        code = super().recompile()
        cls: Any = type(self)
        plain = cls.forward
        has_island = bool(islands(self.graph))
        self.__dict__.update(_lifted={}, _in_place=any(map(is_mutable, self.graph.nodes)), _has_island=has_island)

        def forward(self: BlockModule, *given: Any) -> Any:
            if not torch.is_grad_enabled():
                return plain(self, *given)
            if self._has_island:
                return self._on_autograd(plain, given)
            if torch.compiler.is_compiling():
                if self._in_place or not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
                    return plain(self, *given)
                return partitioned(plain, RECOMPUTED in self.meta, self, *given)
            if torch._C._functorch.peek_interpreter_stack() is not None:  # torch.func's transformations
                return plain(self, *given)
            with LOCK:  # a trace has the shape environment of the capture to itself
                step = self._step(given)
            return plain(self, *given) if step is None else step()

        cls.forward = forward
        return code

    def _on_autograd(self, plain: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        if RECOMPUTED not in self.meta:
            return plain(self, *given)
        return checkpoint(plain, self, *given, use_reentrant=False)

    def _step(self, given: tuple[Any, ...]) -> Callable[[], Any] | None:
        """The call of the planned passes on these inputs; None where the graph is to run as it is."""
        if (known := self._lift(self.training)) is None:
            return None
        graph, text = known
        inputs = (*given, *(get_attribute(self, name) for name in graph.names))
        needs = tuple(isinstance(item, Tensor) and item.requires_grad for item in inputs)
        if not any(needs) or any(map(_differs, inputs, graph.inputs)):
            return None
        constants = tuple(inputs[place] for place in graph.constants)
        device = _device(inputs)
        kind = Kind(text, needs, constants, device, _autocast(device), bool(self.meta.get(RECOMPUTED)), _modes())
        single = isinstance(self.graph.output_node().args[0], fx.Node)
        return partial(_run, program(kind, _Holder(graph)), single, inputs)

    def _lift(self, trains: bool) -> tuple[Lifted, str] | None:
        if trains not in self._lifted:
            found = lifted(self, self.graph, trains)
            self._lifted[trains] = None if found is None else (found, found.text())
        return self._lifted[trains]

    @property
    def stands_alone(self) -> bool:
        """Whether it can be run again by itself."""
        if self._has_island:
            return not self._in_place
        with LOCK:
            return self._lift(True) is not None


def mark(module: fx.GraphModule, blocks: dict[str, Span]) -> None:
    """Tells the folded blocks of `module` that `checkpoint` statements name.

    Raises:
        PeftcError: `cannot-checkpoint`, where a block is no part of the model that could be run again by itself.
    """
    for path, span in blocks.items():
        block = module.get_submodule(path)
        if not isinstance(block, BlockModule) or not block.stands_alone:
            raise PeftcError(CannotCheckpoint(block=path, span=span))
        block.meta[RECOMPUTED] = True


def mark_every(module: nn.Module, blocks: Iterable[str], every: int) -> None:
    """Has every so many of the folded blocks of `module` computed again, from the first one on; of 0 none.

    Raises:
        PeftcError: `cannot-checkpoint`, and nothing is changed, as `mark`.
    """
    there = dict(module.named_modules())
    chosen = [path for path in blocks if path in there]
    for place, path in enumerate(chosen):
        block = there[path]
        if every and not place % every and not (isinstance(block, BlockModule) and block.stands_alone):
            raise PeftcError(CannotCheckpoint(block=path))
    for place, path in enumerate(chosen):
        if every and not place % every:
            there[path].meta[RECOMPUTED] = True
        elif isinstance(there[path], BlockModule):
            there[path].meta.pop(RECOMPUTED, None)


class _Holder:
    """A graph that goes with a key but is no part of it."""

    def __init__(self, graph: Lifted) -> None:
        self.graph = graph

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Holder)


def _differs(item: Any, node: fx.Node) -> bool:
    """Whether a tensor has another precision than where it was captured: the trace would be for that one."""
    return isinstance(item, Tensor) and item.dtype != node.meta["val"].dtype


def _autocast(device: torch.device) -> tuple[str, torch.dtype] | None:
    dtype = autocast_dtype(device.type)
    return None if dtype is None else (device.type, dtype)


def _modes() -> tuple[type, ...]:
    return tuple(map(type, _get_current_function_mode_stack()))


@lru_cache(maxsize=MOST)
def _traced(kind: Kind, holder: _Holder) -> Joint:
    return joint(holder.graph, kind.needs, kind.constants, kind.autocast, kind.device)


@lru_cache(maxsize=MOST)
def program(kind: Kind, holder: _Holder) -> Program:
    """Traces, plans and compiles the two passes of a kind of block; equal blocks of all models share them."""
    graph = holder.graph
    # The first block of a frozen model gets no gradient for the hidden state: with it, its trace is that of the others.
    streams = {_shape(node) for node in graph.outputs} - {None}
    own = len(graph.inputs) - len(graph.names)
    given = [place < own and _shape(node) in streams for place, node in enumerate(graph.inputs)]
    wide = tuple(map(operator.or_, kind.needs, given))
    both = _traced(replace(kind, needs=wide, recompute_all=False), holder)
    both = both.narrowed(graph.reached(kind.needs), tuple(compress(kind.needs, wide)))
    # The block's own tensors are there anyway, and so is what all blocks read: masks, positions, sizes.
    free = [node for place, node in enumerate(both.inputs) if place >= own or not wide[place]]
    passes = split(both, free, recompute_all=kind.recompute_all)
    for half in (passes.forward, passes.backward):
        for node in half.find_nodes(op="call_function", target=torch.ops.aten.view.default):
            node.target = torch.ops.aten.reshape.default  # strides may differ from those of the trace's fake tensors
    if kind.device.type == "cpu":
        for half in (passes.forward, passes.backward):
            on_cpu(half)
    empty = nn.Module()
    return Program(
        fx.GraphModule(empty, passes.forward).forward,
        fx.GraphModule(empty, passes.backward).forward,
        passes, len(both.outputs), both.differentiable, kind.needs,
    )  # fmt: skip


def _shape(node: fx.Node) -> tuple[str, torch.dtype] | None:
    given = node.meta["val"]
    return (str(tuple(given.shape)), given.dtype) if is_tensor(node) and given.is_floating_point() else None


def _run(program: Program, single: bool, inputs: tuple[Any, ...]) -> Any:
    result: Any = _Step.apply(program, *inputs)  # type: ignore[no-untyped-call]
    return result[0] if single else result


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: Program, *inputs: Any) -> tuple[Tensor, ...]:
        with _no_autocast(inputs):
            results = program.forward(*inputs)
        outputs, kept = results[: program.outputs], results[program.outputs :]
        ctx.program = program
        ctx.tensors = [isinstance(item, Tensor) for item in kept]
        ctx.numbers = [item for item in kept if not isinstance(item, Tensor)]
        ctx.save_for_backward(*(item for item in kept if isinstance(item, Tensor)))
        constant = (item for place, item in enumerate(outputs) if place not in program.differentiable)
        ctx.mark_non_differentiable(*(item for item in constant if isinstance(item, Tensor)))
        return outputs

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> tuple[Any, ...]:
        first_derivative()
        program: Program = ctx.program
        tensors, numbers = iter(ctx.saved_tensors), iter(ctx.numbers)
        kept = [next(tensors) if is_tensor else next(numbers) for is_tensor in ctx.tensors]
        given = [tangents[place].contiguous() for place in program.differentiable]
        with _no_autocast(given):
            gradients = iter(program.backward(*kept, *given))
        return None, *(next(gradients) if needed else None for needed in program.needs)


def _no_autocast(given: Any) -> Any:
    """What autocast would do is in the traced graphs."""
    device = _device(given).type
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def _device(given: Iterable[Any]) -> torch.device:
    """Where it is computed; counts that sizes are chosen by may lie on the CPU."""
    return next(item.device for item in given if isinstance(item, Tensor) and item.is_floating_point())
