"""Low-rank branches of one input, of few tokens: each product into the place of the one before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from peftc.graph.ir import computed, value
from peftc.kernels.common.products import WIDE
from peftc.optimise.decoding.packed import Weight, times

Many = Sequence[Tensor]


def products(
    x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None], a: Many, b: Many, scales: Sequence[float]
) -> list[Tensor]:
    """y_i = W_i x + bias_i + scale_i B_i A_i x.

    Args:
        x: [..., n_in].
        weights: W_i [n_out_i, n_in].
        biases: [n_out_i] or None each; empty for none.
        a: A_i [r_i, n_in], in the precision of x or, all of them, in a wider one.
        b: B_i [n_out_i, r_i], as A_i.
        scales: a number each.
    """
    before, n_in = x.shape[:-1], x.shape[-1]
    flat = x.reshape(-1, n_in)
    outputs = []
    if a[0].dtype is not x.dtype:
        wide = flat.to(a[0].dtype)
        for place, weight in enumerate(weights):
            y = times(flat, weight, biases[place] if biases else None)
            y.add_(times(times(wide, a[place]), b[place]), alpha=scales[place])
            outputs.append(y.view(*before, -1))
        return outputs
    for place, weight in enumerate(weights):
        y = times(flat, weight, biases[place] if biases else None)
        if flat.shape[0] == 1 and x.dtype in WIDE:
            y.view(-1).addmv_(b[place], torch.mv(a[place], flat.view(-1)), alpha=scales[place])
        else:
            y.addmm_(torch.mm(flat, a[place].t()), b[place].t(), alpha=scales[place])
        outputs.append(y.view(*before, -1))
    return outputs


def dora_products(
    x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None], a: Many, b: Many, lengths: Many,
    scales: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    """y_i = length_i * (W_i x + scale_i B_i A_i x) + bias_i: as `products`, and lengths [n_out_i]."""
    outputs = products(x, weights, [], a, b, scales)
    for place, y in enumerate(outputs):
        y.mul_(lengths[place])
        if biases and (bias := biases[place]) is not None:
            y.add_(bias)
    return outputs


def fewer_branches(graph: fx.Graph) -> None:
    """Computes fused branches in these few operations, in place, where all is of one dtype but for a wider branch."""
    for target, now in ((torch.ops.peftc.lora_linear.default, products),
                        (torch.ops.peftc.dora_linear.default, dora_products)):  # fmt: skip
        for node in graph.find_nodes(op="call_function", target=target):
            _rewrite(graph, node, now)


def _rewrite(graph: fx.Graph, node: fx.Node, now: Any) -> None:
    given: Any = node.args
    x, weights, biases, a, b, *lengths, scales, transposed, seed, _, _ = given
    base = {value(tensor).dtype for tensor in (x, *weights, *(bias for bias in biases if bias is not None))}
    branches = {value(tensor).dtype for tensor in (*a, *b)}
    reads_hidden = any(user.args[1] == len(weights) for user in node.users)
    if seed is not None or reads_hidden or len(base) > 1 or len(branches) > 1:
        return
    if branches != base and (now is dora_products or not branches <= {*WIDE}):
        return
    with graph.inserting_before(node):
        rows = [_turned(graph, weight) for weight in weights] if transposed else weights
    node.target, node.args = now, (x, rows, biases, a, b, *lengths, scales)


def _turned(graph: fx.Graph, weight: fx.Node) -> fx.Node:
    made = graph.call_function(torch.t, (weight,))
    made.meta["val"] = computed(made)
    return made
