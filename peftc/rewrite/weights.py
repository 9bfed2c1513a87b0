"""A site's part of a weight as the model stores it, and how the base multiplies with it: what rewrites and merges read.

A weight may be stored transposed, and a site may be some rows of it. A branch multiplies as the base does: by the same
operation over the same groups of sorted tokens, so that it can be exported, differentiated and run wherever the base
can, and never sees an expert's dense weight.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from peftc.protocol.method import Multiply
from peftc.protocol.site import Projection, Use

aten = torch.ops.aten

ALIGNMENT = 16  # bytes: what the strides of torch's grouped product must be multiples of


def dense_weight(stored: Tensor, site: Projection, index: Tensor | None = None) -> Tensor:
    """The site's weight as [*batch, n_out, n_in], whatever way it is stored; a view where it can be one."""
    return take(canonical(stored, site), site, -2, index)


def canonical(stored: Tensor, site: Projection) -> Tensor:
    """A view of the whole stored weight whose rows are output features."""
    return stored.transpose(-2, -1) if site.transposed else stored


def replace_rows(stored: Tensor, site: Projection, part: Tensor) -> None:
    """Writes the site's rows of a stored weight, in place."""
    rows = slice(None) if site.rows is None else list(site.rows)
    canonical(stored, site)[..., rows, :] = part


def take(whole: Tensor, site: Projection, dim: int, index: Tensor | None = None) -> Tensor:
    """The site's rows of a fused tensor along `dim`. `index` holds them where they are no range."""
    if site.rows is None:
        return whole
    if site.slice is not None:
        return whole.narrow(dim, site.slice[0], len(site.rows))
    return whole.index_select(dim, torch.tensor(site.rows, device=whole.device) if index is None else index)


def within(site: Projection, use: Use) -> Projection:
    """The site as its rows stand in what the base's product with some rows of the weight gives."""
    if site.rows is None or site.slice is None:
        return site
    rows = tuple(row - use.first for row in site.rows)
    return replace(site, rows=None if rows == tuple(range(int(use.y.meta["val"].shape[-1]))) else rows)


def with_all_rows(y: Tensor, site: Projection, use: Use) -> Tensor:
    """What the base's product gives, with zeros for the rows of the site's weight that it leaves out."""
    missing = site.n_out - y.shape[-1] if site.features_last else 0
    return y if site.rows is not None or missing <= 0 else F.pad(y, (use.first, missing - use.first))


def put(whole: Tensor, part: Tensor, site: Projection, index: Tensor | None) -> Tensor:
    """`whole` with the site's rows (its last dimension) replaced."""
    if site.rows is None:
        return part
    if index is None:
        assert site.slice is not None
        return torch.slice_scatter(whole, part, -1, *site.slice)
    return whole.index_copy(-1, index, part)


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
