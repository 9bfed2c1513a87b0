"""What the parts of the runtime know of a compiled model: its graph, its plan, its base model, how it is called."""

from __future__ import annotations

import torch
from torch import fx, nn

from peftc.capture.convention import Convention
from peftc.planning.plan import Plan
from peftc.runtime.unfrozen import Watch


class Holder(fx.GraphModule):
    """A graph over its tensors, and what it was made of. `peftc.runtime.module` makes it callable.

    plan        what attaches where, and what learns
    base        the model that was compiled; its frozen parameters are the graph's own
    convention  the inputs by name, and what comes back
    history     the flat graph after each pass
    watch       what was unfrozen by hand
    """

    plan: Plan
    base: nn.Module
    convention: Convention
    history: dict[str, fx.Graph]
    logits_in_training: bool
    watch: Watch

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device
