"""How many operations the products of a captured graph take: a multiplication and an addition are two.

Nothing runs, so shapes alone are asked: a product has as many sums as its result has numbers, each as long as the
operands' common side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import fx

from peftc.graph.cut import is_dear
from peftc.graph.ir import is_tensor, value
from peftc.planning.cost import ATTENTION
from peftc.planning.memory import sized

aten = torch.ops.aten

SECOND = {aten.addmm.default, aten.baddbmm.default}  # whose first operand is added


def forward_operations(nodes: Iterable[fx.Node], known: Mapping[Any, int]) -> int:
    """Of the products among `nodes`; `known` has the values of symbolic sizes."""
    return sum(_operations(node, known) for node in nodes if _is_product(node))


def step_operations(nodes: Iterable[fx.Node], needs: set[fx.Node], known: Mapping[Any, int]) -> int:
    """Of a step: each product forward, and backward once for each operand in `needs`."""
    return sum(
        _operations(node, known) * (1 + sum(operand in needs for operand in node.all_input_nodes))
        for node in nodes
        if _is_product(node)
    )


def _is_product(node: fx.Node) -> bool:
    return node.op == "call_function" and is_tensor(node) and is_dear(node)


def _operations(node: fx.Node, known: Mapping[Any, int]) -> int:
    operands = [argument for argument in node.args if isinstance(argument, fx.Node) and is_tensor(argument)]
    shapes = [[sized(size, known) for size in value(operand).shape] for operand in operands]
    made = prod(sized(size, known) for size in value(node).shape)
    if not shapes or not all(shapes):
        return made
    if node.target is ATTENTION:  # q kᵀ, and its product with v
        return 2 * (prod(shapes[0]) + made) * shapes[1][-2]
    if "conv" in str(node.target) and len(shapes) > 1:
        return 2 * made * prod(shapes[1][1:])
    return 2 * made * shapes[node.target in SECOND and len(shapes) > 1][-1]
