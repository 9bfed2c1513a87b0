"""What a pass is written against; and torch, imported when something of it is first used.

Whoever only names a method, or looks at it, does not wait for torch: a file under `passes/` that takes it from here is
read by `peftc check` in milliseconds. One that imports it works as well, and makes whoever reads it wait. `Tensor` is
for annotations alone, `torch.Tensor` for everything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftc.diagnostics.lazy import Lazy

__all__ = ["F", "Lazy", "Tensor", "fx", "torch"]

if TYPE_CHECKING:
    import torch
    from torch import Tensor, fx
    from torch.nn import functional as F
else:
    torch, fx, F = Lazy("torch"), Lazy("torch.fx"), Lazy("torch.nn.functional")
    Tensor = Any
