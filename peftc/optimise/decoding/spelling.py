"""Operations by the names that are called soonest: an overload of ATen costs its caller twice what a function does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from peftc.graph.ir import value
from peftc.kernels.common.operation import call_directly
from peftc.optimise.decoding.packed import linear

aten = torch.ops.aten

# The same operands in the same order.
SOONER: dict[Any, Any] = {
    aten.add.Tensor: torch.add, aten.sub.Tensor: torch.sub, aten.mul.Tensor: torch.mul, aten.div.Tensor: torch.div,
    aten.neg.default: torch.neg, aten.pow.Tensor_Scalar: torch.pow, aten.rsqrt.default: torch.rsqrt,
    aten.mean.dim: torch.mean, aten.cat.default: torch.cat, aten.silu.default: F.silu, aten.linear.default: F.linear,
    aten.transpose.int: torch.transpose, aten.view.default: Tensor.view, aten.reshape.default: torch.reshape,
    aten.unsqueeze.default: torch.unsqueeze, aten.expand.default: Tensor.expand, aten.sym_size.int: Tensor.size,
    aten.matmul.default: torch.matmul, aten.addmm.default: torch.addmm,
    aten.cos.default: torch.cos, aten.sin.default: torch.sin, aten.tanh.default: torch.tanh,
    aten.contiguous.default: Tensor.contiguous, aten.relu.default: torch.relu, aten.permute.default: torch.permute,
}  # fmt: skip


def respell(graph: fx.Graph, *, on_cpu: bool) -> None:
    """Calls functions in place of overloads, in place; on the CPU, of peftc's own operations what they run there, and
    products by the way that is soonest."""
    for node in graph.nodes:
        if on_cpu and node.target is aten.linear.default and not node.kwargs and value(node).dtype is torch.float32:
            node.target = linear
        if not node.kwargs and node.target in SOONER:
            node.target = SOONER[node.target]
    if on_cpu:
        call_directly(graph)
