"""Matrix products by whichever of PyTorch's libraries multiplies them sooner.

In fp32 on the CPU `mm` is MKL's, which on processors of other makers than its own does half of what oneDNN does on one
thread (90 against 200 GFLOP/s on the AMD that this was measured on). The two differ in the order of their sums alone.
`with torch.backends.mkldnn.flags(enabled=False)` leaves all to `mm`.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 16  # each size of a product that oneDNN takes: for less it takes longer to begin


def product(left: Tensor, right: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """left @ right + bias: [m, k] and [k, n] in any layout, [n]. No gradient is recorded; `out` is written if given."""
    if _by_onednn(left, right) and (bias is None or _plain(bias, right)):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
        return result if out is None else out.copy_(result)
    if bias is None:
        return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
    return torch.addmm(bias, left, right) if out is None else torch.addmm(bias, left, right, out=out)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total += left @ right."""
    if _by_onednn(left, right):
        return total.add_(product(left, right))
    return total.addmm_(left, right)


def _plain(bias: Tensor, right: Tensor) -> bool:
    """Whether oneDNN reads the bias for what it is: it takes any for a contiguous one."""
    return bias.is_contiguous() and bias.dtype is torch.float32 and bias.shape == right.shape[1:]


def _by_onednn(left: Tensor, right: Tensor) -> bool:
    return bool(
        left.dtype is right.dtype is torch.float32
        and left.device.type == "cpu"
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
        and left.is_contiguous()
        and min(*left.shape, right.shape[1]) >= SMALLEST
    )
