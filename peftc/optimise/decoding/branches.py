"""Low-rank branches of one input, of few tokens: their A's are stacked once for all tokens, not for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from peftc.graph.ir import computed, value
from peftc.optimise.decoding.program import ONCE

Many = Sequence[Tensor]

# Of which a matrix times one row is sooner than of a matrix of one row.
WIDE = (torch.float32, torch.float64)


def products(
    x: Tensor, weights: Many, biases: Sequence[Tensor | None], a: Tensor, b: Many, scales: Sequence[float],
    ranks: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """y_i = W_i x + bias_i + scale_i B_i S_i with [S_1 … S_n] = A x.

    Args:
        x: [..., n_in].
        weights: W_i [n_out_i, n_in].
        biases: [n_out_i] or None each; empty for none.
        a: A [r_1 + … + r_n, n_in], of all branches.
        b: B_i [n_out_i, r_i].
        scales: a number each.
        ranks: r_i.
    """
    before, n_in = x.shape[:-1], x.shape[-1]
    flat = x.reshape(-1, n_in)
    if flat.shape[0] == 1 and x.dtype in WIDE:
        row = flat.view(n_in)
        hidden = torch.mv(a, row)
        parts = (hidden,) if len(ranks) == 1 else torch.split_with_sizes(hidden, ranks)
        outputs = []
        for place, weight in enumerate(weights):
            bias = biases[place] if biases else None
            y = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
            outputs.append(y.addmv_(b[place], parts[place], alpha=scales[place]).view(*before, -1))
        return outputs
    hidden = torch.mm(flat, a.t())
    parts = (hidden,) if len(ranks) == 1 else torch.split_with_sizes(hidden, ranks, 1)
    outputs = []
    for place, weight in enumerate(weights):
        bias = biases[place] if biases else None
        y = torch.mm(flat, weight.t()) if bias is None else torch.addmm(bias, flat, weight.t())
        outputs.append(y.addmm_(parts[place], b[place].t(), alpha=scales[place]).view(*before, -1))
    return outputs


def dora_products(
    x: Tensor, weights: Many, biases: Sequence[Tensor | None], a: Tensor, b: Many, lengths: Sequence[Tensor],
    scales: Sequence[float], ranks: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """y_i = length_i * (W_i x + scale_i B_i S_i) + bias_i: as `products`, and lengths [n_out_i]."""
    outputs = products(x, weights, [], a, b, scales, ranks)
    for place, y in enumerate(outputs):
        y.mul_(lengths[place])
        if biases and (bias := biases[place]) is not None:
            y.add_(bias)
    return outputs


def stack_branches(graph: fx.Graph) -> None:
    """Prepares what is the same for all tokens of the fused branches, where all is of one dtype."""
    for target, now in ((torch.ops.peftc.lora_linear.default, products),
                        (torch.ops.peftc.dora_linear.default, dora_products)):  # fmt: skip
        for node in graph.find_nodes(op="call_function", target=target):
            _prepare(graph, node, now)


def _prepare(graph: fx.Graph, node: fx.Node, now: Any) -> None:
    given: Any = node.args
    x, weights, biases, a, b, *lengths, scales, transposed, seed, _, _ = given
    count = len(weights)
    tensors = [x, *weights, *a, *b, *(bias for bias in biases if bias is not None)]
    if seed is not None or len({value(tensor).dtype for tensor in tensors}) > 1 or _reads_hidden(node, count):
        return
    with graph.inserting_before(node):
        stacked = a[0] if count == 1 else _once(graph, torch.cat, (list(a),))
        rows = [_once(graph, torch.t, (weight,)) for weight in weights] if transposed else weights
    args = (x, rows, biases, stacked, b, *lengths, scales, [int(value(part).shape[0]) for part in a])
    node.target, node.args = now, args


def _reads_hidden(node: fx.Node, count: int) -> bool:
    return any(user.args[1] == count for user in node.users)


def _once(graph: fx.Graph, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """A node that is computed once where its operands are, whatever its size."""
    made = graph.call_function(target, args)
    made.meta = {"val": computed(made), ONCE: True}
    return made
