"""Operations by the names that are called soonest: an overload of ATen costs its caller twice what a function does."""

from __future__ import annotations

import torch
from torch import fx

from peftc.graph.ir import value
from peftc.kernels.common.operation import call_directly
from peftc.optimise.decoding.packed import linear
from peftc.optimise.on_cpu import call_sooner

aten = torch.ops.aten


def respell(graph: fx.Graph, *, on_cpu: bool) -> None:
    """Calls functions in place of overloads, in place; on the CPU, of peftc's own operations what they run there, and
    products by the way that is soonest."""
    for node in graph.nodes:
        if on_cpu and node.target is aten.linear.default and not node.kwargs and value(node).dtype is torch.float32:
            node.target = linear
    call_sooner(graph)
    if on_cpu:
        call_directly(graph)
