"""Products with weights of eight bits, of few tokens: the integers are multiplied, and the result is scaled."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from peftc.graph.ir import value
from peftc.kernels.dequantize import INT8_STEP

aten = torch.ops.aten
MOST = 8  # rows for which torch's product of bf16 and int8 is sooner than the unpacked one


class Eight(NamedTuple):
    """W [n_out, n_in] = values * scale / 127, a scale a row; values int8, scale fp32."""

    values: Tensor
    scale: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The integers themselves, in another dtype."""
        return self.values.to(dtype)


Weight = Tensor | Eight

# Of which a matrix times one row is sooner than of a matrix of one row.
WIDE = (torch.float32, torch.float64)


def times(rows: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """rows [m, n_in] times Wᵀ, and bias: [m, n_out], which may be written into."""
    if isinstance(weight, Eight):
        return _times_eight(rows, weight, bias)
    if rows.shape[0] == 1 and rows.dtype in WIDE:
        row = rows.view(-1)
        return (torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)).view(1, -1)
    return torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())


def _times_eight(rows: Tensor, weight: Eight, bias: Tensor | None) -> Tensor:
    """In fp32 the integers widened one weight at a time, which a core's cache holds; in bf16 torch's own product."""
    if rows.dtype is torch.bfloat16 and rows.shape[0] <= MOST and rows.device.type == "cpu":
        ones = torch.ones(weight.scale.shape, dtype=rows.dtype)
        y = torch._weight_int8pack_mm(rows, weight.values, ones)
    else:
        y = times(rows, weight.dense(rows.dtype))
    y = y * (weight.scale * INT8_STEP) if y.dtype is not torch.float32 else y.mul_(weight.scale).mul_(INT8_STEP)
    y = y.to(rows.dtype)
    return y if bias is None else y.add_(bias)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., n_in] times Wᵀ, and bias."""
    return times(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)


def keep_eight_bits(graph: fx.Graph, readers: tuple[Any, ...]) -> None:
    """Hands weights of eight bits, as they are, to products that can take them.

    Args:
        graph: changed in place.
        readers: functions that take an `Eight` where they take a weight.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.peftc.dequantize_int8.default):
        values, scale, shape, _ = node.args
        if len(shape) != 2 or value(node).dtype not in (torch.float32, torch.bfloat16, torch.float16):
            continue
        if not all(_is_product(user, node) or user.target in readers for user in node.users):
            continue
        for user in node.users:
            if user.target is aten.linear.default:
                user.target = linear
        node.target, node.args = Eight, (values, scale)


def _is_product(user: fx.Node, weight: fx.Node) -> bool:
    given = user.args
    return user.target is aten.linear.default and given[1] is weight and weight not in (given[0], *given[2:])
