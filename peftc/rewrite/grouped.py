"""The base's own product at a site, for the matrices of a branch: one for all tokens, or one for each expert's.

A branch of stacked experts multiplies as the base does: by the same operation over the same groups of sorted tokens,
so that it can be exported, differentiated and run wherever the base can, and never sees an expert's dense weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from peftc.protocol.site import Multiply

aten = torch.ops.aten

ALIGNMENT = 16  # bytes: what the strides of torch's grouped product must be multiples of


def product_like(op: fx.Node, offsets: Tensor | None) -> Multiply:
    """x, W -> x Wᵀ as the node `op` multiplies, for W of shape [n_out, n_in] or [experts, n_out, n_in].

    Args:
        op: the base's product with the frozen weight.
        offsets: where each expert's tokens end, where `op` takes them.
    """
    if offsets is None:
        return lambda x, W: x @ W.transpose(-2, -1) if W.dim() > 2 else F.linear(x, W)
    target = op.target
    assert callable(target)
    if target is aten._grouped_mm.default:
        dtype = op.meta["val"].dtype
        return lambda x, W: _aligned(x.to(dtype), W.to(dtype), offsets)
    return lambda x, W: target(x.to(W.dtype), W.transpose(-2, -1), offsets)


def _aligned(x: Tensor, W: Tensor, offsets: Tensor) -> Tensor:
    """torch's grouped product, in the base's precision; features are padded with zeros to what it can address."""
    unit = ALIGNMENT // x.element_size()
    n_out, n_in = W.shape[-2:]
    if missing := -n_in % unit:  # not by padding, whose fake fixes the number of tokens
        x = torch.cat([x, torch.zeros_like(x[..., :1]).expand(-1, missing)], dim=-1)
    W = F.pad(W, (0, missing, 0, -n_out % unit))
    result: Tensor = aten._grouped_mm.default(x, W.transpose(-2, -1), offsets)
    return result[..., :n_out]
