"""The ways into a compiled model: a graph for each way it is called, over the same parameters.

With labels or without; with the logits or, in a training step, the loss alone; with a mean of its own or one over the
tokens of several batches (`peftc.runtime.token_mean`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from peftc.capture.convention import without_loss
from peftc.diagnostics.diagnostic import PeftcError
from peftc.optimise.fuse import Fired
from peftc.optimise.loss_only import training_entry
from peftc.runtime.consistency import two_passes
from peftc.runtime.errors import NeedsLabels
from peftc.runtime.holder import Holder
from peftc.runtime.token_mean import with_token_count

Code = Callable[..., Any]


@dataclass(frozen=True)
class Entry:
    """One way in: the code of a graph, to be run on the module that it was made for.

    `with_loss`: whether a loss is the first of what it returns. `counted`: whether it takes the number of tokens that
    the loss is divided by, behind the inputs.
    """

    code: Code
    with_loss: bool = True
    counted: bool = False

    def run(self, module: Holder, given: dict[str, Any], tokens: Any = None) -> Any:
        """What the base model returns for `given`, the inputs by name and in their order."""
        convention = module.convention
        count = (torch.as_tensor(tokens, device=module.device),) if self.counted else ()
        step = partial(self.code, module, *given.values(), *count)
        weight = convention.consistency if module.training and self.with_loss else 0.0
        leaves = two_passes(step, weight, convention.logits, given.get("labels")) if weight else step()
        return convention.unflatten(leaves, with_loss=self.with_loss)


class Entries:
    """Every entry of a module, those that a training does not need made when they are first asked for."""

    def __init__(self, module: Holder, own: Code) -> None:
        """`own` is the code of the module's graph itself. Under `torch.compile` no other graph can be made."""
        graph = with_token_count(module.graph, module.plan)
        counted = None if graph is None else Entry(code_of(module, graph), counted=True)
        self._complete = {False: Entry(own), True: counted}
        self._loss_alone: dict[bool, Entry | None] | None = None
        self._without_labels: Entry | None = None
        self._parts: dict[Callable[[Holder], fx.Graph], Code] = {}
        self.fired = () if module.logits_in_training else self._make_loss_alone(module)

    @property
    def counts_tokens(self) -> bool:
        """Whether the loss can be divided by a number of tokens that the caller gives."""
        return self._complete[True] is not None

    def choose(self, module: Holder, given: dict[str, Any], tokens: Any = None) -> Entry:
        """The entry for a call.

        Args:
            module: what the entries are of.
            given: the inputs by name; labels may be missing.
            tokens: how many tokens the loss is a mean over; its own if None.

        Raises:
            PeftcError: `needs-labels` where nothing can be computed without.
        """
        if len(given) < len(module.convention.inputs):
            return self._unlabelled(module)
        counted = tokens is not None
        if module.training and not module.logits_in_training:
            if self._loss_alone is None:
                self._make_loss_alone(module)
            assert self._loss_alone is not None
            if (alone := self._loss_alone[counted]) is not None:
                return alone
        complete = self._complete[counted]
        assert complete is not None
        return complete

    def part(self, make: Callable[[Holder], fx.Graph], module: Holder) -> Code:
        """The code of a graph that `make` makes of a module's own, once."""
        if make not in self._parts:
            self._parts[make] = code_of(module, make(module))
        return self._parts[make]

    def _unlabelled(self, module: Holder) -> Entry:
        if self._without_labels is None:
            graph = without_loss(module.graph, module.convention.result)
            if graph is None:
                raise PeftcError(NeedsLabels(model=module.plan.sites.model))
            self._without_labels = Entry(code_of(module, graph), with_loss=False)
        return self._without_labels

    def _make_loss_alone(self, module: Holder) -> tuple[Fired, ...]:
        """The entries of a training step that returns no logits, and how often its fusions fired."""
        graph, fired = training_entry(module, module.graph, module.convention)
        plain = None if graph is None else Entry(code_of(module, graph))
        self._loss_alone = {False: plain, True: None}
        if plain is not None and (longer := with_token_count(module.graph, module.plan)) is not None:
            graph, _ = training_entry(module, longer, module.convention)
            self._loss_alone[True] = (
                None if graph is None else replace(plain, code=code_of(module, graph), counted=True)
            )
        return fired


def code_of(module: Holder, graph: fx.Graph) -> Code:
    """The code of a graph, to be run on the module that it reads the tensors of."""
    code: Code = type(fx.GraphModule(module, graph)).forward
    return code
