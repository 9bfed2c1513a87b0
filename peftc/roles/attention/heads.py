"""How an attention's heads lie: counts, widths, and which heads of the keys its own heads read, by data flow alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from peftc.graph.ir import value
from peftc.graph.rows import Known, hint, path_between, rows_of_parts
from peftc.protocol.site import AttentionPattern, Linear, Use
from peftc.roles.products import Product

Rows = tuple[int, ...] | None


def attention_facts(
    module: fx.GraphModule, pattern: AttentionPattern, k: Product, v: Product, rows: Sequence[Rows], known: Known
) -> dict[str, Any] | None:
    """What an `Attention` site says beyond a `Sublayer`; None where the heads lie in no known way.

    `k` and `v` are the layers that project keys and values, `rows` the parts of q's, k's and v's fused weights.
    Known are operands [batch, heads, tokens, width], and with one leading dimension for batch and heads, batch first.
    """
    key, values = _layer(k, rows[1]), _layer(v, rows[2])
    heads = _heads(module, pattern, key, values, k.use, known)
    if heads is None:
        return None
    return {**heads, "pattern": pattern, "key": key, "value": values, "obstacle": _sink(pattern)}


def _sink(pattern: AttentionPattern) -> str | None:
    """Whether the softmax runs over more than the scores of keys."""
    if pattern.scores is None or pattern.softmax is None:
        return None
    joined = any(node.target is torch.ops.aten.cat.default for node in path_between(pattern.scores, pattern.softmax))
    return "its softmax runs over a sink beside the keys, which nothing else can be put beside" if joined else None


def _layer(product: Product, rows: Rows) -> Linear:
    return Linear(
        product.weight, product.weight.rpartition(".")[0], frozenset(), parameters=(product.weight,),
        n_in=product.n_in, n_out=len(rows) if rows else product.n_out, weight=product.weight, owner=product.weight,
        bias=product.bias, transposed=product.transposed, rows=rows,
    )  # fmt: skip


def _heads(
    module: fx.GraphModule, pattern: AttentionPattern, key: Linear, values: Linear, use: Use, known: Known
) -> dict[str, Any] | None:
    q, k, v = value(pattern.q), value(pattern.k), value(pattern.v)
    key_width, value_width = q.shape[-1], v.shape[-1]
    if not isinstance(key_width, int) or not isinstance(value_width, int):
        return None
    if q.dim() == k.dim() == v.dim() == 4:
        heads, own = q.shape[1], k.shape[1]
        if not isinstance(heads, int) or not isinstance(own, int) or v.shape[1] != own or heads % own:
            return None
    elif q.dim() == k.dim() == v.dim() == 3:
        heads = own = _folded(pattern, use.y)
    else:
        return None
    kv_heads = key.n_out // key_width
    if key.n_out != kv_heads * key_width or values.n_out != kv_heads * value_width or not kv_heads or own % kv_heads:
        kv_heads = own  # keys of more than one layer's making: each of the attention's heads has its own
    groups = tuple(range(own)) if own == kv_heads else _groups(module, pattern, key, use, known)
    if not groups:
        return None
    return {
        "heads": heads, "kv_heads": kv_heads, "key_width": key_width, "value_width": value_width, "groups": groups,
    }  # fmt: skip


def _folded(pattern: AttentionPattern, y: fx.Node) -> int:
    """How many heads share the operands' leading dimension with the batch, at the sizes of the capture's example.

    Of the keys' tokens a cache may give some: then those of the queries are the tokens of the layer's output `y`.
    """
    examples = prod(hint(size) for size in value(y).shape[:-1])
    q, k = value(pattern.q), value(pattern.k)
    keys = hint(k.shape[-1 if pattern.scores else -2])
    tokens = hint(q.shape[-2]) if examples % keys else keys
    return int(hint(k.shape[0]) * tokens // examples)


def _groups(module: fx.GraphModule, pattern: AttentionPattern, key: Linear, use: Use, known: Known) -> tuple[int, ...]:
    """The key head that each head of the operand k is a copy of; empty where it is of none or of several."""
    if value(pattern.k).dim() != 4:
        return ()
    rows = key.rows or tuple(range(key.n_out))
    head_of = {row - use.first: place // value(pattern.q).shape[-1] for place, row in enumerate(rows)}
    touched = rows_of_parts(module, use.y, pattern.k, known, _each_head)
    found = [{head_of.get(row, -1) for row in own} for own in touched]
    return tuple(one.pop() for one in found) if all(len(one) == 1 and -1 not in one for one in found) else ()


def _each_head(result: torch.Tensor) -> Sequence[torch.Tensor]:
    return result.unbind(1)
