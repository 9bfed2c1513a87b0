"""Where the masks of seeded dropout come from: one number a forward pass, drawn as torch's own dropout draws."""

from __future__ import annotations

import torch
from torch import Tensor


def dropout_seed(training: bool, device: torch.device) -> Tensor | None:
    """A seed from the default generator, so that `torch.manual_seed` decides it, int64 []; None in `eval()`.

    A function of its own, for a graph to call with `self.training` as it is at run time.
    """
    return torch.randint(2**63 - 1, (), device=device) if training else None
