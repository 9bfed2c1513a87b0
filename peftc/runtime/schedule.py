"""Methods with a schedule: what happens after each step of the optimiser, by hand or under a Trainer.

Two hooks on the optimiser do it, so that any training loop works: one before the step, which remembers what is to be
warmed up, one after it, which calls each scheduled method's `on_step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.ir import get_attribute
from peftc.protocol.method import Place, Step
from peftc.runtime.errors import BadSchedule
from peftc.runtime.holder import Holder


class Follower:
    """Drives those scheduled methods of a model whose tensors an optimiser trains, by its steps, until `remove()`."""

    def __init__(self, compiled: Holder, optimizer: Optimizer, step: int = 0, total: int | None = None) -> None:
        """`step`: how many steps have been made already, where training goes on; `total`: how many there will be.

        Raises:
            PeftcError: `bad-schedule` where a method's schedule does not fit into so many steps.
        """
        self.compiled = compiled
        self.optimizer = optimizer
        self.step = step
        self.total = total
        trained = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        scheduled = [
            (binding, names)
            for binding, names in compiled.plan.placed
            if binding.method.scheduled and any(id(t) in trained for t in _tensors(compiled, names).values())
        ]
        self.statements = [list(members) for _, members in groupby(scheduled, key=lambda placed: placed[0].span)]
        problems = [
            BadSchedule(method=first.method.name, reason=reason, span=first.span)
            for (first, _), *_ in self.statements
            if (reason := first.method.misfit(total)) is not None
        ]
        if problems:
            raise PeftcError(*problems)
        self.cold: list[tuple[float, Tensor, Tensor]] = []
        self.hooks: tuple[RemovableHandle, ...] = ()
        if scheduled:
            after = optimizer.register_step_post_hook(self._after)
            self.hooks = (optimizer.register_step_pre_hook(self._before), after)

    def remove(self) -> None:
        """Stops following."""
        for hook in self.hooks:
            hook.remove()

    def _before(self, *_: Any) -> None:
        """Remembers the parameters whose step is to be a shorter one."""
        self.cold = []
        for placed in self.statements:
            warmth = placed[0][0].method.warmth(self.step + 1)
            if warmth != 1:
                tensors = (tensor for _, names in placed for tensor in _tensors(self.compiled, names).values())
                learning = {id(tensor): tensor for tensor in tensors if tensor.requires_grad}
                self.cold += [(warmth, tensor, tensor.detach().clone()) for tensor in learning.values()]

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        self.step += 1
        for warmth, tensor, before in self.cold:  # as if the learning rate had been that multiple
            tensor.copy_(torch.lerp(before, tensor, warmth))
        step = Step(self.step, self.optimizer, self.total)
        for placed in self.statements:
            method = placed[0][0].method
            places = [Place(binding.site, _tensors(self.compiled, names)) for binding, names in placed]
            if method.on_step(step, places) and method.prepares:
                self.compiled.prepare()


def _tensors(compiled: Holder, names: Mapping[str, str]) -> dict[str, Tensor]:
    return {name: get_attribute(compiled, full) for name, full in names.items()}


class Schedule(TrainerCallback):
    """Follows the optimiser of a `transformers.Trainer`: `Trainer(..., callbacks=[model.callback()])`."""

    def __init__(self, compiled: Holder) -> None:
        self.compiled = compiled
        self.follower: Follower | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Trainer has made its optimiser, and knows at which step it goes on."""
        self.on_train_end(args, state, control)  # of a training that was cut short, maybe with this very optimiser
        optimizer = given["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self.follower = Follower(self.compiled, optimizer, state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """A checkpoint of this step is about to be overwritten, of another run with the same folder: it is none now.

        Trainer writes the model first and this file last: killed between them, it would leave a checkpoint that
        resumes one run's model with the other's optimiser.
        """
        if control.should_save and state.is_world_process_zero:
            Path(args.output_dir, f"checkpoint-{state.global_step}", "trainer_state.json").unlink(missing_ok=True)

    on_epoch_end = on_step_end

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The optimiser may be used on for something else."""
        if self.follower is not None:
            self.follower.remove()
            self.follower = None
