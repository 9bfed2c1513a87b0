"""`CompiledModule`: the trainable graph as users see it, with the files it is written to."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, overload

from torch import nn

from peftc.files.artifact import save
from peftc.files.hf_peft.folder import save_pretrained
from peftc.files.merge import merge
from peftc.files.repack import Rounding, repack
from peftc.runtime.module import Runtime
from peftc.show.tables import report


class CompiledModule(Runtime):
    """A model with its adapters in the graph. Call it as the base model: `module(input_ids=…, labels=…)`.

    `state_dict()` holds what peftc added and what learns, not the frozen base, so a Trainer's checkpoints are small
    and resume. `plan` says what attaches where, `history` maps each pass to the flat graph after it,
    `fired` says how often each fusion did, and how near the others came.

    In `train()` a call with labels may return the loss with None for the logits, as their cross-entropy is computed
    without ever holding all of them; `eval()` returns both. Set `logits_in_training` to have them in training, too.
    """

    def report(self) -> str:
        """What `peftc compile` prints: statement, sites, parameters, share; and how often each fusion fired."""
        return report(self.plan, self.fired)

    def save(self, folder: str | Path) -> None:
        """Writes spec, tensors and a reference to the base model; `peftc.load` reads it back."""
        save(self, Path(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the folder that HF PEFT reads: one method that it has, on whole modules, prompts or prefixes."""
        save_pretrained(self, Path(folder))

    @overload
    def merge(self) -> nn.Module: ...

    @overload
    def merge(self, *, requantize: Literal[False]) -> nn.Module: ...

    @overload
    def merge(self, *, requantize: Literal[True]) -> tuple[nn.Module, dict[str, Rounding]]: ...

    def merge(self, *, requantize: bool = False) -> nn.Module | tuple[nn.Module, dict[str, Rounding]]:
        """A model of the base's own class that computes the same, with no trace of peftc.

        With `requantize` each weight that is packed here is rounded to its storage's numbers again, and what that
        loses comes back beside the model, by the weight's name. Else it stays in the precision of the base.
        """
        if not requantize:
            return merge(self)
        found = repack(self)
        return found.model, found.lost
