"""A graph as plain lists and back: operations by name, symbolic sizes as lists, fake values computed anew.

What is read is held against what was written: every fake value has to come out in the sizes that it had. Operations are
looked up among those of torch, transformers and peftc; nothing else that a file names is ever called.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from peftc.capture.recorded.errors import NotRecordedError
from peftc.capture.recorded.expressions import as_lists, from_lists
from peftc.graph.ir import STACK, compute, expression, fake_mode
from peftc.graph.rows import hint

NAMESPACES = ("aten", "peftc", "prims", "transformers")
OPS = ("placeholder", "get_attr", "call_function", "output")
TRACE = "stack_trace"
CONSTANTS = {
    str(value): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format)
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in (
        "getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge",
        "and_", "or_",
    )},
    **{f"torch.{name}": getattr(torch, name) for name in (
        "sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum",
    ) if hasattr(torch, name)},
}  # fmt: skip
NAMES = {function: name for name, function in FUNCTIONS.items()}


def symbols_of(graph: fx.Graph) -> list[sympy.Symbol]:
    """What stood for each size of the inputs that was open, before anything was learnt of it, in their order."""
    return [*_open_sizes(graph)]


def _open_sizes(graph: fx.Graph) -> dict[sympy.Symbol, int]:
    values = (node.meta["val"] for node in graph.find_nodes(op="placeholder"))
    sizes: Iterable[Any] = (size for value in values if isinstance(value, torch.Tensor) for size in value.shape)
    return {
        size.node._expr: hint(size)
        for size in sizes
        if isinstance(size, torch.SymInt) and isinstance(size.node._expr, sympy.Symbol)
    }


# ---- Writing -------------------------------------------------------------------------------------------------------


def as_told(graph: fx.Graph) -> list[Any]:
    """The nodes in their order.

    Raises:
        NotRecordedError: where one computes or holds what is not of these libraries.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    symbols = {symbol: place for place, symbol in enumerate(symbols_of(graph))}
    return [
        [
            node.op, node.name, _target(node), _argument(node.args, places), _argument(node.kwargs, places),
            _value(node.meta.get("val"), symbols),
            [[key, str(path), str(kind)] for key, (path, kind) in (node.meta.get(STACK) or {}).items()],
            node.meta.get(TRACE, ""),
        ]
        for node in graph.nodes
    ]  # fmt: skip


def _target(node: fx.Node) -> str:
    if node.op in ("placeholder", "get_attr", "output"):
        return str(node.target)
    if isinstance(node.target, OpOverload) and node.target.namespace in NAMESPACES:
        return str(node.target)
    if node.op == "call_function" and node.target in NAMES:
        return NAMES[node.target]
    raise NotRecordedError(f"{node.name} calls {node.target}")


def _argument(given: Any, places: Mapping[fx.Node, int]) -> Any:
    if isinstance(given, fx.Node):
        return {"node": places[given]}
    if given is None or isinstance(given, bool | int | str):
        return given
    if isinstance(given, float):
        return {"float": given.hex()}
    if isinstance(given, torch.device):
        return {"device": str(given)}
    if str(given) in CONSTANTS:
        return {"torch": str(given)}
    if isinstance(given, slice):
        return {"slice": [_argument(one, places) for one in (given.start, given.stop, given.step)]}
    if isinstance(given, tuple):
        return {"tuple": [_argument(one, places) for one in given]}
    if isinstance(given, list):
        return [_argument(one, places) for one in given]
    if isinstance(given, dict):
        return {"dict": [[_argument(key, places), _argument(one, places)] for key, one in given.items()]}
    raise NotRecordedError(f"{given!r} is an argument")


def _value(value: Any, symbols: Mapping[sympy.Symbol, int]) -> Any:
    """What a value is held against when it is computed anew."""
    if isinstance(value, torch.Tensor):
        sizes = [[as_lists(expression(one), symbols) for one in ones] for ones in (value.shape, value.stride())]
        return [str(value.dtype), str(value.device), *sizes]
    if isinstance(value, list | tuple):
        return {"parts": [_value(one, symbols) for one in value]}
    if isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat):
        return {"size": as_lists(value.node.expr, symbols)}
    if value is None or isinstance(value, bool | int | float):
        return {"number": repr(value)}
    raise NotRecordedError(f"a {type(value).__name__} is computed")


# ---- Reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """Makes a graph of what was told of it.

    `inputs` is a graph of the inputs alone, with fake values; `tensors` has what `get_attr` reads.
    """

    inputs: fx.Graph
    tensors: Mapping[str, torch.Tensor]

    @property
    def mode(self) -> FakeTensorMode:
        """What its fake values are of."""
        return fake_mode(self.inputs)

    @property
    def env(self) -> ShapeEnv:
        """What its sizes are of."""
        assert self.mode.shape_env is not None
        return self.mode.shape_env

    @cached_property
    def example(self) -> dict[sympy.Symbol, int]:
        """What each symbol was in the example."""
        return _open_sizes(self.inputs)

    def learn(self, questions: Iterable[sympy.Basic]) -> None:
        """What was so of the sizes, in the order in which it was asked."""
        for holds in questions:
            self.env.evaluate_expr(holds, hint=sympy.true)

    def read(self, told: Sequence[Any]) -> fx.Graph:
        """The graph.

        Raises:
            NotRecordedError: where it does not fit the inputs or the tensors, or a value is not what it was.
        """
        graph = fx.Graph()
        symbols = symbols_of(self.inputs)
        given = {str(node.target): node.meta["val"] for node in self.inputs.find_nodes(op="placeholder")}
        nodes: list[fx.Node] = []
        for op, name, target, args, kwargs, value, stack, trace in told:
            if op not in OPS:
                raise NotRecordedError(f"{op} {target!r} is nothing that a graph has")
            called = _called(target) if op == "call_function" else target
            node = graph.create_node(op, called, _given(args, nodes), _given(kwargs, nodes), name=name)
            nodes.append(node)
            if stack:
                node.meta[STACK] = {key: (path, kind) for key, path, kind in stack}
            if trace:
                node.meta[TRACE] = trace
            if op == "output":
                continue
            if op == "placeholder":
                node.meta["val"] = given[target]
            elif op == "get_attr":
                node.meta["val"] = self.mode.from_tensor(self.tensors[target], static_shapes=True)
            else:
                compute(node)
            if not self._is(node.meta["val"], value, symbols):
                raise NotRecordedError(f"{name} comes out as {node.meta['val']}, not as {value}")
        return graph

    def _is(self, value: Any, told: Any, symbols: Sequence[sympy.Symbol]) -> bool:
        if isinstance(value, torch.Tensor):
            if not isinstance(told, list):
                return False
            kind, device, shape, strides = told
            alike = (str(value.dtype), str(value.device), value.dim()) == (kind, device, len(shape))
            same = alike and all(self._is_size(one, was, symbols) for one, was in zip(value.shape, shape, strict=True))
            lies = [self._at_example(from_lists(one, symbols)) for one in strides]
            return same and lies == [self._at_example(expression(one)) for one in value.stride()]
        if isinstance(value, list | tuple):
            parts = told["parts"]
            return len(parts) == len(value) and all(map(self._is, value, parts, [symbols] * len(value)))
        if isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat):
            return "size" in told and self._is_size(value, told["size"], symbols)
        return bool(told.get("number") == repr(value))

    def _at_example(self, size: Any) -> int:
        """A stride, which may be said in one way or another, in the example's sizes."""
        return int(sympy.sympify(size).xreplace(self.example))

    def _is_size(self, value: Any, told: Any, symbols: Sequence[sympy.Symbol]) -> bool:
        now = value.node.expr if hasattr(value, "node") else value
        return bool(self.env.replace(from_lists(told, symbols)) == self.env.replace(sympy.sympify(now)))


def _called(name: str) -> Callable[..., Any]:
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    namespace, packet, overload = name.split(".")
    if namespace not in NAMESPACES:
        raise NotRecordedError(f"{name} is no known operation")
    found = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    assert isinstance(found, OpOverload)
    return found


def _given(told: Any, nodes: Sequence[fx.Node]) -> Any:
    if isinstance(told, list):
        return [_given(one, nodes) for one in told]
    if not isinstance(told, dict):
        return told
    ((kind, inner),) = told.items()
    match kind:
        case "node":
            return nodes[inner]
        case "float":
            return float.fromhex(inner)
        case "device":
            return torch.device(inner)
        case "torch":
            return CONSTANTS[inner]
        case "slice":
            return slice(*(_given(one, nodes) for one in inner))
        case "tuple":
            return tuple(_given(one, nodes) for one in inner)
        case "dict":
            return {_given(key, nodes): _given(one, nodes) for key, one in inner}
    raise NotRecordedError(f"{kind} is no argument")
