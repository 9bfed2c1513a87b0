"""`CompiledModule`: the trainable graph as users see it, with the files it is written to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, overload

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from peftc.driver import tasks
from peftc.driver.decoding import runs_whole_texts
from peftc.files.artifact import save
from peftc.files.export.export import Exported, export_adapter, export_merged
from peftc.files.hf_peft.folder import save_pretrained
from peftc.files.merge import merge
from peftc.files.repack import Rounding, repack
from peftc.runtime.module import Runtime
from peftc.runtime.tensors.whole import needs_whole, whole
from peftc.show.notebook import Report, image_html, report_html
from peftc.show.tables import report

BATCH_NORMS = "batch norms: these use their running statistics in training, too, and leave them as they are"
WHOLE_TEXTS = "text: this model's cache cannot be captured, so the whole text runs for each token"


class CompiledModule(Runtime):
    """A model with its adapters in the graph. Call it as the base model: `module(input_ids=…, labels=…)`.

    `state_dict()` holds what peftc added and what learns, not the frozen base, so a Trainer's checkpoints are small
    and resume. `plan` says what attaches where, `history` maps each pass to the flat graph after it,
    `fired` says how often each fusion did, and how near the others came.

    In `train()` a call with labels may return the loss with None for the logits, as their cross-entropy is computed
    without ever holding all of them; `eval()` returns both. Set `logits_in_training` to have them in training, too.
    """

    def report(self) -> Report:
        """What `peftc compile` prints: statement, sites, parameters, share; how often each fusion fired; notes.

        A text, which a notebook shows as tables.
        """
        fired, notes = self.face().fired, self.notes()
        return Report("\n".join((report(self.plan, fired), *notes)), report_html(self.plan, fired, notes))

    def _repr_html_(self) -> str:
        """For a notebook: the report, and the first block that the spec touches as an image."""
        return self.report().html + image_html(self.face())

    def notes(self) -> tuple[str, ...]:
        """What is to be known of this model beyond its tables."""
        told = {BATCH_NORMS: _has_statistics(self.base), WHOLE_TEXTS: runs_whole_texts(self.face())}
        return tuple(words for words, holds in told.items() if holds)

    def save(self, folder: str | Path, *, task: str | None = None) -> None:
        """Writes spec, tensors and a reference to the base model; `peftc.load` reads it back.

        With `task` only that one, by itself, with what all tasks have in common. Of a model of which each process has
        a part all of them call it, and one writes.
        """
        with self.gathered() as (model, writes):
            if writes:
                save(model if task is None else model.face([task]), Path(folder))

    def save_pretrained(self, folder: str | Path, *, task: str | None = None) -> None:
        """Writes the folder that HF PEFT reads: one method that it has, on whole modules, prompts or prefixes.

        Of several tasks each has a folder of its own inside, called as the task; or there is only that of `task`. Of a
        model of which each process has a part all of them call it, and one writes.
        """
        if task is not None or not self.tasks:
            with self.gathered() as (model, writes):
                if writes:
                    save_pretrained(model if task is None else model.face([task]), Path(folder))
            return
        for each in self.tasks:
            save_pretrained(self.face([each]), Path(folder) / each)

    @contextmanager
    def gathered(self) -> Iterator[tuple[Runtime, bool]]:
        """The model with what was added to it whole, and whether this process is to write it.

        All processes that have parts come here. Only the base model stays in parts.
        """
        if self.split is not None:
            with self.split.gathered(self) as found:
                yield found
            return
        with whole(self, self.plan.added) as writes:
            yield self, writes

    def export(
        self,
        to: Literal["gguf", "vllm"],
        path: str | Path,
        *,
        merged: bool = False,
        dtype: str | None = None,
        task: str | None = None,
        tokenizer: Any = None,
    ) -> list[Exported]:
        """Writes what another runtime loads, and returns what that is.

        An adapter is beside the base model's own GGUF file or folder: `llama-cli -m BASE --lora PATH`, `vllm serve BASE
        --enable-lora --lora-modules NAME=PATH`. A merged model is everything: weights, settings and tokenizer.

        Args:
            to: "gguf", one file for llama.cpp; "vllm", a folder.
            path: of the file or folder, where nothing may be yet.
            merged: with what was learned in the weights, of the task in use; any method that merges may be exported
                so, and an adapter holds low-rank branches alone.
            dtype: float32, float16, bfloat16, or q8_0 in a GGUF file; by default fp32 for an adapter and the base's own
                for a merged model. Norms and vectors of a GGUF file stay in fp32.
            task: that one. Of an adapter with several each has a file or folder of its own, called as the task, in a
                folder `path`, by default.
            tokenizer: that of a merged model, or a folder or hub id that has one; by default the base model's.

        Raises:
            PeftcError: `not-in-gguf` and `not-in-vllm` with all that the runtime would not take, or not take for what
                it is; `cannot-merge`; `no-tokenizer`; `unknown-task`; `unknown-export`; `bad-output` if something is at
                `path`; `cannot-write`.
        """
        needs_whole(self, "an export")
        place = Path(path)
        if merged:
            face = self.face(None if task is None else [task])
            return [export_merged(face, to, place, dtype, tokenizer)]
        if task is not None or not self.tasks:
            return [export_adapter(self if task is None else self.face([task]), to, place, dtype)]
        ending = ".gguf" if to == "gguf" else ""
        return [export_adapter(self.face([each]), to, place / f"{each}{ending}", dtype) for each in self.tasks]

    # Tasks

    def add_task(self, name: str, given: str | Path) -> Self:
        """Adds a task, for which the model is not captured again.

        Args:
            name: of the task.
            given: the text of its statements, a `.peft` file of them; or a folder that one task was saved to, by peftc
                or by HF PEFT.

        Raises:
            PeftcError: what `peftc.compile` says of statements, and `peftc.load` of folders.
        """
        tasks.add(self, name, given)
        return self

    def replace_task(self, name: str, given: str | Path) -> Self:
        """Another task, as of `add_task`, in place of one."""
        tasks.add(self, name, given, instead=True)
        return self

    def remove_task(self, name: str) -> Self:
        """Takes a task out. Where it was in use, what all tasks have in common is."""
        tasks.remove(self, name)
        return self

    def rename_task(self, name: str, new: str) -> Self:
        """Gives a task another name."""
        tasks.rename(self, name, new)
        return self

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
        needs_whole(self, "a merge")
        face = self.face()  # what is in use is what is merged
        if not requantize:
            return merge(face)
        found = repack(face)
        return found.model, found.lost


def _has_statistics(base: nn.Module) -> bool:
    """Whether some batch norm of a model has running statistics."""
    return any(isinstance(module, _BatchNorm) and module.track_running_stats for module in base.modules())
