"""Products with packed weights, of few tokens: integers are multiplied and the result is scaled; of four bits, in bf16,
the packed bytes themselves, where the CPU has a product for that.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

import peftc.kernels.common.products as matrices
from peftc.graph.ir import value
from peftc.kernels.common.fused4 import OUTPUTS, Turned, product, there_is, turned
from peftc.kernels.dequantize import INT8_STEP, decoded, dequantize_int8, levels_of, scales_of

aten = torch.ops.aten
WHOLE = 64  # torch's product with int8 reads so many numbers of a row at a time, or fewer, and takes no rest
MOST, FEW = 8, 16  # rows for which products of bf16 with int8, and with four bits, are sooner than the unpacked ones


class Eight(NamedTuple):
    """W [n_out, n_in] = values * scale / 127, a scale a row; values int8, scale fp32."""

    values: Tensor
    scale: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The integers themselves, in another dtype."""
        return self.values.to(dtype)


class Four(NamedTuple):
    """W [n_out, n_in] in four bits, as `dequantize_4bit` takes it but for its scales, which are fp32.

    And turned, where there is a product that reads it so.
    """

    packed: Tensor
    absmax: Tensor
    levels: str
    block: int
    shape: tuple[int, int]
    turned: Turned | None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The numbers."""
        return decoded(self.packed, self.absmax, self.levels, self.block, self.shape, dtype)


Weight = Tensor | Eight | Four


def times(rows: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """rows [m, n_in] times Wᵀ, and bias: [m, n_out], which may be written into."""
    if isinstance(weight, Eight):
        return _times_eight(rows, weight, bias)
    if isinstance(weight, Four):
        if weight.turned is not None and rows.shape[0] <= FEW:
            y = product(rows, weight.turned)
            return y if bias is None else y.add_(bias)
        return matrices.product(rows, weight.dense(rows.dtype).t(), bias, unpacked=True)
    return matrices.product(rows, weight.t(), bias)


def _times_eight(rows: Tensor, weight: Eight, bias: Tensor | None) -> Tensor:
    """In fp32 the integers widened one weight at a time, which a core's cache holds; in bf16 torch's own product.

    Sums of integers may be more than float16 has.
    """
    if rows.dtype is torch.float16:
        dense = dequantize_int8(weight.values, weight.scale, weight.values.shape, rows.dtype)
        return matrices.product(rows, dense.t(), bias, unpacked=True)
    n_out, n_in = weight.values.shape
    whole = not (n_in % WHOLE or n_out % WHOLE)
    if rows.dtype is torch.bfloat16 and rows.shape[0] <= MOST and rows.device.type == "cpu" and whole:
        y = torch._weight_int8pack_mm(rows, weight.values, torch.ones(n_out, dtype=rows.dtype))
    else:
        y = matrices.product(rows, weight.dense(rows.dtype).t(), unpacked=True)
    y = y * (weight.scale * INT8_STEP) if y.dtype is not torch.float32 else y.mul_(weight.scale).mul_(INT8_STEP)
    y = y.to(rows.dtype)
    return y if bias is None else y.add_(bias)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., n_in] times Wᵀ, and bias."""
    y = times(x.reshape(prod(x.shape[:-1]), x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], y.shape[1])


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


def four(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None, levels: str, block: int,
    shape: tuple[int, int], dtype: torch.dtype,
) -> Four:  # fmt: skip
    """What `dequantize_4bit` is given, and what a product in bf16 reads packed, where there is one."""
    scales = scales_of(absmax, nested_absmax, offset)
    fits = dtype is torch.bfloat16 and not shape[0] % OUTPUTS and there_is(levels, block)
    made = turned(packed, scales, levels_of(levels, packed.device), block, shape) if fits else None
    return Four(packed, scales, levels, block, shape, made)


def keep_four_bits(graph: fx.Graph, readers: tuple[Any, ...]) -> None:
    """Hands weights of four bits, as they are, to products that can take them.

    Args:
        graph: changed in place.
        readers: functions that take a `Four` where they take a weight.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.peftc.dequantize_4bit.default):
        *_, block, shape, dtype = node.args
        numbers = all(isinstance(size, int) for size in shape) and len(shape) == 2
        if dtype not in (torch.bfloat16, torch.float32) or value(node).device.type != "cpu" or not numbers:
            continue
        if shape[1] % block:
            continue
        if all(_is_product(user, node) or user.target in readers for user in node.users):
            for user in node.users:
                if user.target is aten.linear.default:
                    user.target = linear
            node.target = four


def _is_product(user: fx.Node, weight: fx.Node) -> bool:
    given = user.args
    return user.target is aten.linear.default and given[1] is weight and weight not in (given[0], *given[2:])
