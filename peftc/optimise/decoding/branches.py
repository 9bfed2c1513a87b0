"""Low-rank branches of one input, of few tokens: each product into the place of the one before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from peftc.graph.ir import computed, drop_unread, value

aten = torch.ops.aten
LINEAR, ROW_SCALES = aten.linear.default, torch.ops.peftc.row_scales.default

Many = Sequence[Tensor]

# Of which a matrix times one row is sooner than of a matrix of one row.
WIDE = (torch.float32, torch.float64)


def products(
    x: Tensor, weights: Many, biases: Sequence[Tensor | None], a: Many, b: Many, scales: Sequence[float]
) -> list[Tensor]:
    """y_i = W_i x + bias_i + scale_i B_i A_i x.

    Args:
        x: [..., n_in].
        weights: W_i [n_out_i, n_in].
        biases: [n_out_i] or None each; empty for none.
        a: A_i [r_i, n_in].
        b: B_i [n_out_i, r_i].
        scales: a number each.
    """
    before, n_in = x.shape[:-1], x.shape[-1]
    flat = x.reshape(-1, n_in)
    outputs = []
    if flat.shape[0] == 1 and x.dtype in WIDE:
        row = flat.view(n_in)
        for place, weight in enumerate(weights):
            bias = biases[place] if biases else None
            y = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
            y.addmv_(b[place], torch.mv(a[place], row), alpha=scales[place])
            outputs.append(y.view(*before, -1))
        return outputs
    for place, weight in enumerate(weights):
        bias = biases[place] if biases else None
        y = torch.mm(flat, weight.t()) if bias is None else torch.addmm(bias, flat, weight.t())
        y.addmm_(torch.mm(flat, a[place].t()), b[place].t(), alpha=scales[place])
        outputs.append(y.view(*before, -1))
    return outputs


def dora_products(
    x: Tensor, weights: Many, biases: Sequence[Tensor | None], a: Many, b: Many, lengths: Many, scales: Sequence[float]
) -> list[Tensor]:
    """y_i = length_i * (W_i x + scale_i B_i A_i x) + bias_i: as `products`, and lengths [n_out_i]."""
    outputs = products(x, weights, [], a, b, scales)
    for place, y in enumerate(outputs):
        y.mul_(lengths[place])
        if biases and (bias := biases[place]) is not None:
            y.add_(bias)
    return outputs


def products_by_row(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scales: Tensor) -> Tensor:
    """y = W x + bias + B (s * A x), where each row of the batch has scales of its own.

    Args:
        x: [batch, tokens, n_in].
        weight: W [n_out, n_in].
        bias: [n_out] or None.
        a: [r, n_in].
        b: [n_out, r].
        scales: [batch, 1, r].
    """
    batch, tokens, n_in = x.shape
    flat = x.reshape(-1, n_in)
    y = torch.mm(flat, weight.t()) if bias is None else torch.addmm(bias, flat, weight.t())
    thin = torch.mm(flat, a.t())
    thin.view(batch, tokens, -1).mul_(scales)
    return y.addmm_(thin, b.t()).view(batch, tokens, -1)


def fewer_by_row(graph: fx.Graph) -> None:
    """Computes branches whose columns belong to rows of the batch in these few operations, all of one dtype."""
    for scaled in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        found = _around(scaled)
        if found is not None and len({value(node).dtype for node in found[1:] if node is not None}) == 1:
            total, *operands = found
            total.target, total.args = products_by_row, tuple(operands)
    drop_unread(graph)


def _around(scaled: fx.Node) -> tuple[Any, ...] | None:
    """y = linear(x, W, bias) + linear(linear(x, A) * s, B) around the product with s: y, x, W, bias, A, B, s."""
    thin, scales = scaled.args
    source: Any = scales.args[0] if isinstance(scales, fx.Node) and scales.args else None
    if not (isinstance(thin, fx.Node) and isinstance(scales, fx.Node)) or thin.target is not LINEAR:
        return None
    if scales.target is not aten.unsqueeze.default or source.target is not ROW_SCALES:
        return None
    wide, total = _only(scaled, LINEAR), None
    if wide is not None and (total := _only(wide, aten.add.Tensor)) is not None and not total.kwargs:
        base: Any = total.args[0]
        alone = isinstance(base, fx.Node) and base.target is LINEAR and len(base.users) == 1
        if alone and len(thin.users) == 1 and base.args[0] is thin.args[0] and value(base).dim() == 3:
            x, weight, *bias = base.args
            return total, x, weight, *(bias or [None]), thin.args[1], wide.args[1], scales
    return None


def _only(node: fx.Node, target: Any) -> fx.Node | None:
    """The one node that reads another, where it is of this kind."""
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and readers[0].target is target else None


def fewer_branches(graph: fx.Graph) -> None:
    """Computes fused branches in these few operations, in place, where all is of one dtype."""
    for target, now in ((torch.ops.peftc.lora_linear.default, products),
                        (torch.ops.peftc.dora_linear.default, dora_products)):  # fmt: skip
        for node in graph.find_nodes(op="call_function", target=target):
            _rewrite(graph, node, now)


def _rewrite(graph: fx.Graph, node: fx.Node, now: Any) -> None:
    given: Any = node.args
    x, weights, biases, a, b, *lengths, scales, transposed, seed, _, _ = given
    tensors = [x, *weights, *a, *b, *(bias for bias in biases if bias is not None)]
    reads_hidden = any(user.args[1] == len(weights) for user in node.users)
    if seed is not None or reads_hidden or len({value(tensor).dtype for tensor in tensors}) > 1:
        return
    with graph.inserting_before(node):
        rows = [_turned(graph, weight) for weight in weights] if transposed else weights
    node.target, node.args = now, (x, rows, biases, a, b, *lengths, scales)


def _turned(graph: fx.Graph, weight: fx.Node) -> fx.Node:
    made = graph.call_function(torch.t, (weight,))
    made.meta["val"] = computed(made)
    return made
