"""The ways into a compiled model: a graph for each way it is called, over the same parameters.

With labels or without; with the logits or, in a training step, the loss alone; with a mean of its own or one over the
tokens of several batches (`peftc.runtime.token_mean`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx

from peftc.capture.convention import without_loss
from peftc.diagnostics.diagnostic import PeftcError
from peftc.optimise.fuse import Fired
from peftc.optimise.loss_only import training_entry
from peftc.runtime.errors import NeedsLabels
from peftc.runtime.token_mean import with_items

if TYPE_CHECKING:
    from peftc.runtime.module import CompiledModule

Code = Callable[..., Any]


class Entries:
    """The code of each entry but the module's own forward, which has the logits: to be run on that very module."""

    def __init__(self, module: CompiledModule) -> None:
        """Makes what a training needs at once: under `torch.compile` no graph can be made."""
        self._without_labels: Code | None = None
        self._loss_alone: dict[bool, Code | None] = {}
        counted = with_items(module.graph, module.plan)
        self.counted: Code | None = None if counted is None else _code(module, counted)
        self.fired = None if module.logits_in_training else self._make_loss_alone(module)

    def without_labels(self, module: CompiledModule) -> Code:
        """For a call without labels; made on first use."""
        if self._without_labels is None:
            graph = without_loss(module.graph, module.convention.keys)
            if graph is None:
                raise PeftcError(NeedsLabels(model=module.plan.sites.model))
            self._without_labels = _code(module, graph)
        return self._without_labels

    def loss_alone(self, module: CompiledModule, counted: bool) -> Code | None:
        """For a training step that returns no logits, where there is such."""
        if not self._loss_alone:
            self._make_loss_alone(module)
        return self._loss_alone[counted]

    def _make_loss_alone(self, module: CompiledModule) -> Fired:
        graph, fired = training_entry(module, module.graph, module.convention)
        self._loss_alone[False] = None if graph is None else _code(module, graph)
        self._loss_alone[True] = None
        if graph is not None and (counted := with_items(module.graph, module.plan)) is not None:
            graph, _ = training_entry(module, counted, module.convention)
            self._loss_alone[True] = None if graph is None else _code(module, graph)
        return fired


def _code(module: CompiledModule, graph: fx.Graph) -> Code:
    code: Code = type(fx.GraphModule(module, graph)).forward
    return code
