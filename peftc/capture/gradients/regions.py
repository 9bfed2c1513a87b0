"""Where a model's own code turns gradients off, its graph gives on what is computed there without one.

A model is traced with gradients off throughout, so that none is kept of numbers that nobody has; its regions, which say
`torch.no_grad()` and the like, are told by marks in the graph. What leaves one is detached.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import get_ident
from types import FrameType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.autograd import grad_mode
from torch.overrides import TorchFunctionMode
from torch.utils import _contextlib
from torch.utils import _pytree as pytree
from transformers.exporters.utils import patch_attributes

from peftc.graph.ir import Memory, compute, computed, get_attribute, is_mutable, memories, memory
from peftc.graph.repeat import BEGIN

aten = torch.ops.aten
# Torch and this compiler turn gradients on and off for themselves.
OURS = tuple(f"{folder}/" for folder in (Path(torch.__file__).parent, Path(__file__).parents[2]))

KINDS = (torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode)
DATA = cast(Any, Tensor.data).__get__

DECORATING = (_contextlib.__file__, grad_mode.__file__)

library = torch.library.Library("peftc", "FRAGMENT")
library.define("gradients(bool on) -> ()")
MARK = torch.ops.peftc.gradients.default
torch.library.impl(library, "gradients", "CompositeExplicitAutograd")(lambda _on: None)
fx.node.has_side_effect(MARK)


@contextmanager
def regions_marked() -> Iterator[None]:
    """While it is open, a trace has a mark where the code of a model, none of `OURS`, turns gradients off or on."""
    now = [True]  # whether there would be gradients, were it not traced
    before: dict[int, list[bool]] = {}
    thread = get_ident()  # others may have regions of their own meanwhile

    def is_a_models(frame: FrameType | None) -> bool:
        return get_ident() == thread and _is_a_models(frame)

    def told(on: bool) -> None:
        if now[0] != on:
            now[0] = on
            MARK(on)

    def entering(on: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
        def around(own: Callable[..., None]) -> Callable[..., None]:
            def enter(self: Any) -> None:
                if is_a_models(sys._getframe(1)):
                    self.prev = torch.is_grad_enabled()
                    before.setdefault(id(self), []).append(now[0])
                    told(on)
                else:
                    before.pop(id(self), None)  # of another that was here before
                    own(self)

            return enter

        return around

    def setting(own: Callable[..., None]) -> Callable[..., None]:
        def init(self: Any, mode: bool) -> None:
            if is_a_models(sys._getframe(1)):
                own(self, torch.is_grad_enabled())
                before[id(self)] = [now[0]]
                told(mode)
            else:
                before.pop(id(self), None)
                own(self, mode)

        return init

    def leaving(own: Callable[..., Any]) -> Callable[..., Any]:
        def leave(self: Any, *error: Any) -> Any:
            result = own(self, *error)
            if get_ident() == thread and (earlier := before.get(id(self))):
                told(earlier.pop())
            return result

        return leave

    def inferring(own: Callable[..., None]) -> Callable[..., None]:
        def enter(self: Any) -> None:
            if is_a_models(sys._getframe(1)):  # what is made in such a mode could not be traced
                before.setdefault(id(self), []).append(now[0])
                self._inference_mode_context = nullcontext()
                told(now[0] and not self.mode)
            else:
                before.pop(id(self), None)
                own(self)

        return enter

    patches: list[tuple[Any, str, Any]] = [
        (torch.no_grad, "__enter__", entering(False)),
        (torch.enable_grad, "__enter__", entering(True)),
        (torch.set_grad_enabled, "__init__", setting),
        (torch.set_grad_enabled, "__call__", leaving),  # as a decorator it was on until then
        (torch.inference_mode, "__enter__", inferring),
        *((cls, "__exit__", leaving) for cls in KINDS),
    ]
    with patch_attributes(patches), _WithoutData():
        yield


class _WithoutData(TorchFunctionMode):
    """A weight's `.data`, which no trace knows, is the weight detached."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == DATA and isinstance(args[0], nn.Parameter):
            return args[0].detach()
        return func(*args, **(kwargs or {}))


def _is_a_models(frame: FrameType | None) -> bool:
    """Whether code in `frame` is none of `OURS`; where a context of torch is a decorator, the decorated function's."""
    while frame is not None and frame.f_code.co_filename in DECORATING:
        function = inspect.unwrap(frame.f_locals["func"]) if "func" in frame.f_locals else None
        if isinstance(function, FunctionType):
            return not function.__code__.co_filename.startswith(OURS)
        frame = frame.f_back
    return frame is not None and not frame.f_code.co_filename.startswith(OURS)


def without_gradients(module: fx.GraphModule) -> fx.Node | None:
    """Takes the marks out of a graph; what is computed between them and read elsewhere is detached.

    Only what could have a gradient is: a rotary embedding is computed of positions.

    Returns:
        A node that writes, where gradients are off, on what was computed where they are on: the gradient would go by
        what was there before, which no graph says.
    """
    for inner in module.children():
        if isinstance(inner, fx.GraphModule) and (writing := without_gradients(inner)) is not None:
            return writing
    graph = module.graph
    marks = graph.find_nodes(op="call_function", target=MARK)
    if not marks:
        return None
    learning, there = _Learning(module), set[Memory]()  # the memory of what is computed outside of regions
    region: dict[fx.Node, None] | None = None
    nodes: list[fx.Node] = list(graph.nodes)
    for node in nodes:
        if node.target is MARK:
            if node.args[0] and region is not None:
                _leave(node, region, learning)
            region = None if node.args[0] else {}
        elif region is not None:
            if is_mutable(node) and _writes_elsewhere(node, there, learning):
                return node
            region[node] = None
        elif node.op != "output":
            there |= memories(node)
        if node.target is not MARK:
            learning.add(node)
    for mark in marks:
        graph.erase_node(mark)
    module.recompile()
    return None


def writes_on_a_weight(module: fx.GraphModule) -> tuple[fx.Node, str] | None:
    """An operation that writes on a parameter, and which; such as one that clamps it whenever the model runs."""
    writing = [node for node in module.graph.nodes if is_mutable(node) and isinstance(node.args[0], fx.Node)]
    weights = {
        memory(node): str(node.target)
        for node in (module.graph.find_nodes(op="get_attr") if writing else ())
        if isinstance(get_attribute(module, str(node.target)), nn.Parameter)
    }
    written = ((node, one) for node in writing for one in memories(node.args[0]) if one in weights)
    return next(((node, weights[one]) for node, one in written), None)


class _Learning:
    """What may have a gradient, as a graph is walked through: floats computed of parameters or of inputs."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.nodes: set[fx.Node] = set()
        self.written: set[Memory] = set()  # memory that one of them was written into

    def add(self, node: fx.Node) -> None:
        if node.target is BEGIN:  # of a block that stands for others, which may be given other things
            self.nodes |= {given for given in node.all_input_nodes if _has_floats(given)}
        if not _has_floats(node) or node.op == "output" or node.target is aten.detach.default:
            return
        if node.op == "get_attr":
            own = isinstance(get_attribute(self.module, str(node.target)), nn.Parameter)
        else:
            own = node.op == "placeholder" or any(map(self.has, node.all_input_nodes))
        if own:
            self.nodes.add(node)
            if is_mutable(node):
                self.written |= memories(node)

    def has(self, node: fx.Node) -> bool:
        return node in self.nodes or (bool(self.written) and not self.written.isdisjoint(memories(node)))


def _has_floats(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()) for leaf in leaves)


def _writes_elsewhere(node: fx.Node, there: set[Memory], learning: _Learning) -> bool:
    """Whether what has or would get a gradient is written into what was computed outside of the region."""
    target = node.args[0]
    if not isinstance(target, fx.Node) or there.isdisjoint(memories(target)):
        return False
    return any(map(learning.has, node.all_input_nodes))


def _leave(end: fx.Node, region: dict[fx.Node, None], learning: _Learning) -> None:
    """Detaches what nodes of a region that ends with a mark give to nodes behind it."""
    detached: dict[fx.Node, fx.Node] = {}
    for node in region:
        readers = [user for user in node.users if user not in region]
        if not readers or not isinstance(node.meta.get("val"), Tensor) or not learning.has(node):
            continue
        own = _was_given(node)
        if own in region and own not in detached:
            with end.graph.inserting_before(end):
                detached[own] = end.graph.call_function(aten.detach.default, (own,))
            detached[own].meta = dict(own.meta)
            compute(detached[own])
        for reader in readers:
            reader.replace_input_with(node, detached.get(own, own))


def _was_given(node: fx.Node) -> fx.Node:
    """What made the tensor that a node returns: another where it returns what it is given, as `.to(x.dtype)` does.

    A trace has such a node in all that reads the tensor later, also where the model's code does not.
    """
    while not is_mutable(node):
        result = computed(node)
        given = next((one for one in node.all_input_nodes if one.meta.get("val") is result), None)
        if given is None:
            break
        node = given
    return node
