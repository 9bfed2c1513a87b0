"""A planned pass as it is called on the CPU: with less said to Python, and nothing computed twice that is at hand."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from peftc.graph.ir import value
from peftc.kernels.common.operation import call_directly
from peftc.kernels.common.products import product
from peftc.kernels.gated_activation import again, backward_of

aten = torch.ops.aten

# By names that are called soonest, the same operands in the same order: an overload costs its caller twice as much.
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


def call_sooner(graph: fx.Graph) -> None:
    """Calls functions in place of overloads, in place."""
    for node in graph.nodes:
        if not node.kwargs and node.target in SOONER:
            node.target = SOONER[node.target]


def on_cpu(graph: fx.Graph) -> None:
    """Readies a graph that runs on CPU tensors, below autograd and outside of any trace, in place."""
    _multiply_fast(graph)
    _activate_once(graph)
    call_sooner(graph)
    call_directly(graph)


def _multiply_fast(graph: fx.Graph) -> None:
    """Gives the products that no kernel has to the sooner library."""
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        node.target = product
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
        bias, left, right = node.args
        if not node.kwargs and isinstance(bias, fx.Node) and value(bias).dim() == 1:
            node.target, node.args = product, (left, right, bias)


def _activate_once(graph: fx.Graph) -> None:
    """A gated activation that a backward pass computes again leaves the activated gate to its own derivative."""
    operation = torch.ops.peftc.gated_activation
    again_of = {node.args: node for node in graph.find_nodes(op="call_function", target=operation.default)}
    for node in graph.find_nodes(op="call_function", target=torch.ops.peftc.gated_activation_backward.default):
        gradient, *given = node.args
        made = again_of.pop(tuple(given), None)
        if made is None or made > node:
            continue
        with graph.inserting_before(made):
            both = graph.call_function(again, made.args)
            result, activated = (graph.call_function(operator.getitem, (both, place)) for place in range(2))
        made.replace_all_uses_with(result)
        graph.erase_node(made)
        gate, up, activation = given
        node.target, node.args = backward_of, (gradient, gate, up, activated, activation)
