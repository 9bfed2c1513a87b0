"""One capture of a model for all tests of a process: it takes seconds, and each compile uses a graph up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx, nn

from peftc.capture import Captured, capture

captures: dict[tuple[int, str], tuple[nn.Module, Captured]] = {}


def captured_once(model: nn.Module, example: Any, *more: Any) -> Captured:
    """`capture`, once for each model and shape of inputs; each caller gets a graph of its own."""
    key = id(model), str({name: (tensor.shape, tensor.dtype) for name, tensor in example.kwargs.items()})
    if key not in captures:
        captures[key] = model, capture(model, example, *more)  # with the model, whose id is then nobody else's
    known = captures[key][1]
    graph = fx.Graph()
    graph.output(graph.graph_copy(known.module.graph, {}))
    return replace(known, module=fx.GraphModule(known.module, graph, class_name=type(model).__name__))
