"""Attention of few tokens to many: the heads that share keys read them where they lie, and not copied for each."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention

from peftc.graph.ir import value
from peftc.graph.shared_heads import shared_by_both
from peftc.optimise.shorten import ENDLESS

aten = torch.ops.aten


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """softmax(scale q kᵀ + mask) v, each head of k and v for as many in a row of q: [batch, heads, tokens, width].

    Heads that share keys are further rows of one query, where it is one token's and no head's mask is its own.
    """
    batch, heads, tokens, width = q.shape
    shared = k.shape[1]
    if heads == shared:
        return scaled_dot_product_attention(q, k, v, mask, scale=scale)
    if tokens == 1 and (mask is None or mask.shape[1] == 1):
        rows = q.reshape(batch, shared, heads // shared, width)
        found = scaled_dot_product_attention(rows, k, v, mask, scale=scale)
        return found.reshape(batch, heads, 1, -1)
    return scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


def seen(mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What a mask of yes and no adds to the scores, once for all layers; None where nothing is hidden.

    On the CPU alone it is looked at: elsewhere who looks waits.
    """
    if mask.dtype is not torch.bool:
        return mask
    if mask.device.type == "cpu" and bool(mask.all()):
        return None
    return torch.zeros((), dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def share_keys(graph: fx.Graph) -> None:
    """Leaves out the copies of keys and values for the heads of one group, and looks at each mask once."""
    masks: dict[fx.Node, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
        given |= node.kwargs
        if given.get("dropout_p") or given.get("is_causal") or given.get("enable_gqa"):
            continue
        mask = given.get("attn_mask")
        if mask is not None and value(mask).dim() != 4:
            continue
        k, v = shared_by_both(given["key"], given["value"]) or (given["key"], given["value"])
        if mask is not None and mask not in masks:
            with graph.inserting_after(mask):
                masks[mask] = graph.call_function(seen, (mask, value(given["query"]).dtype))
            masks[mask].meta = dict(mask.meta)
        node.target = attended
        node.args, node.kwargs = (given["query"], k, v, mask and masks[mask], given.get("scale")), {}


def drop_whole_slices(graph: fx.Graph) -> None:
    """Leaves out slices that are all of what they are of, and products with one."""
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if node.op != "call_function" or not isinstance(source, fx.Node):
            continue
        if (node.target is aten.slice.Tensor and tuple(node.args[2:]) == (0, ENDLESS)) or (
            node.target is aten.mul.Tensor and node.args[1] == 1 and value(node).dtype == value(source).dtype
        ):
            node.replace_all_uses_with(source)
