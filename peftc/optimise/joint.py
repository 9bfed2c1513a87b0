"""A block's forward pass and its backward pass as one graph, so that they can be planned together.

    inputs, gradients of the outputs -> outputs, gradients of the inputs that need one

Traced below autograd: what comes out is what autograd would run, operation by operation, with nothing computed for
the frozen weights. The block's tensors are inputs like the others, so that equal blocks have one such graph.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from peftc.graph.ir import COPY, fake_mode, get_attribute, is_mutable, is_tensor, memory
from peftc.kernels.island import islands
from peftc.optimise.shorten import shorten

aten = torch.ops.aten
TRAINING = "training"


@dataclass(frozen=True, eq=False)
class Lifted:
    """A block's graph with the block's tensors as inputs behind its own: `names` says which, in order."""

    graph: fx.Graph
    names: tuple[str, ...]

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders: what is passed to the block, then its tensors."""
        return list(self.graph.find_nodes(op="placeholder"))

    @property
    def constants(self) -> list[int]:
        """The places of inputs that are no tensor and no symbol, such as a probability: a trace is for their values."""
        values = [node.meta["val"] for node in self.inputs]
        return [place for place, item in enumerate(values) if not isinstance(item, (Tensor, torch.SymInt))]

    @property
    def outputs(self) -> list[fx.Node]:
        """What the block returns."""
        returned = self.graph.output_node().args[0]
        return [returned] if isinstance(returned, fx.Node) else list(returned)  # type: ignore[arg-type]

    def reached(self, needs: tuple[bool, ...]) -> set[int]:
        """Which outputs depend on the inputs that need a gradient, by a way that gradients take back."""
        learning = {node for node, needed in zip(self.inputs, needs, strict=True) if needed}
        for node in self.graph.nodes:
            if node.target is not aten.detach.default and any(source in learning for source in node.all_input_nodes):
                learning.add(node)
        return {place for place, node in enumerate(self.outputs) if node in learning}

    def text(self) -> str:
        """The graph without its names: the same for blocks that compute the same on tensors of the same kind."""
        places = {node: f"%{place}" for place, node in enumerate(self.graph.nodes)}
        lines = [
            f"{node.op} {node.target if node.op == 'call_function' else ''} "
            f"{fx.map_arg((node.args, node.kwargs), lambda given: _Place(places[given]))}"
            for node in self.graph.nodes
        ]
        return "\n".join([*lines, *(kind(node.meta["val"]) for node in self.inputs)])


class _Place(str):
    """A node's number in a graph's text."""

    __slots__ = ()

    __repr__ = str.__str__


@dataclass(frozen=True, eq=False)
class Joint:
    """Both passes in one graph: the placeholders are the block's inputs and, behind them, the tangents.

    There is a tangent for each output that `differentiable` names, and a gradient for each input that needs one; it is
    None where the outputs do not depend on the input. An output may be a number.
    """

    graph: fx.Graph
    inputs: list[fx.Node]
    tangents: list[fx.Node]
    outputs: list[fx.Node | int]
    gradients: list[fx.Node | None]
    differentiable: tuple[int, ...]

    def narrowed(self, outputs: set[int], wanted: tuple[bool, ...]) -> Joint:
        """The same with tangents of these outputs alone, and those gradients alone that are wanted."""
        ends = [
            (place, node) for place, node in zip(self.differentiable, self.tangents, strict=True) if place in outputs
        ]
        return replace(
            self,
            tangents=[node for _, node in ends],
            gradients=list(compress(self.gradients, wanted)),
            differentiable=tuple(place for place, _ in ends),
        )


def lifted(block: nn.Module, graph: fx.Graph, trains: bool) -> Lifted | None:
    """`graph` with the tensors of `block` as inputs, in train mode or not; None if one autograd function cannot be it.

    It can be where nothing is written in place, no module is an island, and no tensor that comes out is in an input's
    memory or in another's.
    """
    if islands(graph):
        return None
    new = fx.Graph()
    env: dict[fx.Node, Any] = {node: new.placeholder(node.name) for node in graph.find_nodes(op="placeholder")}
    names: list[str] = []
    for node in graph.find_nodes(op="get_attr"):
        target = str(node.target)
        if target == TRAINING:
            env[node] = trains
        elif isinstance(get_attribute(block, target), Tensor):
            env[node] = new.placeholder(node.name)
            names.append(target)
        else:
            return None
    for node in graph.nodes:
        if node.op == "call_function":
            env[node] = new.node_copy(node, env.__getitem__)
        elif node.op == "output":
            new.output(fx.map_arg(node.args[0], env.__getitem__))
    for old, made in env.items():
        if isinstance(made, fx.Node):
            made.meta = {key: old.meta[key] for key in ("val", COPY) if key in old.meta}
    result = Lifted(new, tuple(names))
    return result if _apart(result) else None


def _apart(graph: Lifted) -> bool:
    if any(is_mutable(node) for node in graph.graph.nodes):
        return False
    made = [memory(node) for node in graph.outputs if is_tensor(node)]
    taken = {memory(node) for node in graph.inputs if is_tensor(node)}
    return bool(made) and len(set(made)) == len(made) and taken.isdisjoint(made)


def kind(given: Any) -> str:
    """Shape, strides, dtype and device of a tensor; of anything else its type."""
    if not isinstance(given, Tensor):
        return type(given).__name__
    return f"{tuple(given.shape)} {given.stride()} {given.dtype} {given.device}"


def joint(
    graph: Lifted,
    needs: tuple[bool, ...],
    constants: tuple[Any, ...] = (),
    autocast: tuple[str, torch.dtype] | None = None,
    device: torch.device | None = None,
) -> Joint:
    """Traces both passes of `graph`.

    Args:
        graph: what is differentiated; its fake values say for which shapes, symbolic ones stay symbolic.
        needs: which inputs need a gradient, in order.
        constants: the values of the inputs that `graph.constants` names.
        autocast: device type and dtype, where autocast is on.
        device: where the tensors are, if no longer where the model was captured: operations differ by device.
    """
    inputs = [node.meta["val"] for node in graph.inputs]
    for place, constant in zip(graph.constants, constants, strict=True):
        inputs[place] = constant
    mode = fake_mode(graph.graph)
    assert mode.shape_env is not None
    module = fx.GraphModule(nn.Module(), graph.graph)
    tensors = [place for place, node in enumerate(graph.outputs) if is_tensor(node)]
    differentiable: list[int] = []

    def both(given: list[Any], tangents: list[Tensor]) -> tuple[list[Any], list[Tensor | None]]:
        leaves = [
            item.detach().requires_grad_(needed) if isinstance(item, Tensor) else item
            for item, needed in zip(given, needs, strict=True)
        ]
        result = module.forward(*leaves)  # past the hooks on all modules, which are for the real step
        outputs = list(result) if isinstance(result, tuple) else [result]
        reached = [(outputs[place], tangent) for place, tangent in zip(tensors, tangents, strict=True)]
        # Under autocast an output may have another precision than where the model was captured.
        reached = [(output, tangent.to(output.dtype)) for output, tangent in reached if output.requires_grad]
        differentiable[:] = [place for place in tensors if outputs[place].requires_grad]
        learning = [leaf for leaf, needed in zip(leaves, needs, strict=True) if needed]
        ends, coming = zip(*reached, strict=True) if reached else ((), ())
        return outputs, list(torch.autograd.grad(ends, learning, coming, allow_unused=True))

    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(mode)
        stack.enter_context(mode.shape_env.suppress_guards())  # a guard could fix the batch or the length for good
        stack.enter_context(enable_python_dispatcher())
        stack.enter_context(torch.enable_grad())
        # The caller's own hooks, which may look into tensors, are for the real step, as its modes are.
        stack.enter_context(saved_tensors_hooks(lambda saved: saved, lambda saved: saved))
        if autocast is not None:
            stack.enter_context(torch.autocast(*autocast, cache_enabled=False))
        ends = [_fresh(graph.outputs[place].meta["val"], device) for place in tensors]
        tangents = [torch.empty_like(end, memory_format=torch.contiguous_format) for end in ends]
        given = [_fresh(item, device) for item in inputs], tangents
        traced = make_fx(both)(*given).graph
        if any(map(is_mutable, traced.nodes)):  # some derivatives write in place, and what is kept is chosen by values
            traced = make_fx(functionalize(fx.GraphModule(nn.Module(), traced)))(*given).graph
    reached = [tensors.index(place) for place in differentiable]
    return _as_joint(shorten(traced), len(inputs), len(graph.outputs), tuple(differentiable), reached)


def _fresh(item: Any, device: torch.device | None) -> Any:
    """Inputs that were copied from one template may be one fake value, which tracing takes for one argument."""
    if not isinstance(item, Tensor):
        return item
    if device is None or device == item.device:
        return item.detach()
    return torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device=device)


def _as_joint(graph: fx.Graph, inputs: int, outputs: int, differentiable: tuple[int, ...], reached: list[int]) -> Joint:
    places = list(graph.find_nodes(op="placeholder"))
    tangents = [places[inputs + place] for place in reached]
    returned: Any = pytree.tree_leaves(graph.output_node().args[0], is_leaf=lambda item: item is None)
    return Joint(graph, places[:inputs], tangents, returned[:outputs], returned[outputs:], differentiable)
