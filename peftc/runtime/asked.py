"""What others ask of a model: transformers' `generate` and pipelines, TRL's trainers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from threading import RLock
from typing import Any, cast

from torch import nn

from peftc.capture.cached import CACHES
from peftc.diagnostics.diagnostic import PeftcError
from peftc.optimise.regions import mark_every
from peftc.runtime.backbone import Backbone, head
from peftc.runtime.errors import CannotGenerate, CannotRecompute
from peftc.runtime.generation.decoder import Decoder
from peftc.runtime.generation.text import view
from peftc.runtime.holder import Holder
from peftc.runtime.tensors.whole import needs_whole

LOCK = RLock()  # one captures at a time
# What `torch.utils.checkpoint` takes beside the call.
TORCHS = frozenset({"use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop"})


def recompute(compiled: Asked, every: int) -> None:
    """Has every so many blocks of a compiled model computed again, unless its spec says which; of 0 none."""
    if not compiled.plan.recomputed:
        mark_every(compiled, compiled.plan.sites.blocks, every)
    compiled.__dict__["recomputes_every"] = every


class Asked(Holder):
    """A compiled model as far as others look at it without calling it."""

    make_continuation: Callable[[Any], Decoder | None] | None
    continues_by: Decoder | None
    is_fused: bool
    recomputes_every: int  # every how many blocks, where it was asked for after the compile; 0 for none

    def face(self, tasks: Any = None) -> Any:
        """What runs a call."""
        raise NotImplementedError

    def lying_together(self, tasks: Any) -> AbstractContextManager[None]:
        """Inside, the tensors of tasks lie where a batch of several of them reads them soonest."""
        raise NotImplementedError

    # What trainers of other libraries ask for

    @property
    def base_model(self) -> Any:
        """The model without its head, to be called: hidden states with their gradients."""
        return Backbone(self.face()) if hasattr(self.base, "base_model") else self

    def get_output_embeddings(self) -> nn.Module | None:
        """The head, over the compiled model's own tensors."""
        return head(self.face())

    @property
    def warnings_issued(self) -> dict[str, bool]:
        """Which warnings trainers have given; theirs to write."""
        known: dict[str, bool] = self.__dict__.setdefault("issued", {})
        return known

    @property
    def main_input_name(self) -> str:
        """What the model reads."""
        return str(getattr(self.base, "main_input_name", self.convention.inputs[0]))

    @property
    def name_or_path(self) -> str:
        """Where the base model came from."""
        return str(getattr(self.base, "name_or_path", ""))

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Remembers tags for a model card, as transformers does."""
        known = self.__dict__.setdefault("model_tags", [])
        known += [tag for tag in ([tags] if isinstance(tags, str) else tags) if tag not in known]

    # Activation checkpointing

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether a training step computes blocks again, because the spec or a call says so."""
        face = self.face()
        return bool(face.plan.recomputed or self.recomputes_every)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """transformers' old name for it, by which TRL and HF PEFT ask."""
        return self.is_activation_checkpointing

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """From now on a training step keeps of a block its inputs alone, as with `checkpoint block` in the spec.

        A spec that says itself which blocks has its way: then this changes nothing, nor does disabling it.

        Args:
            activation_checkpointing_kwargs: transformers passes them on to `torch.utils.checkpoint`. How a module is
                run again has no meaning here, as none is: `use_reentrant` and the like make no difference.
            every_n_layers: only every so many blocks, from the first one on.
            offload: to keep the inputs in the host's memory; refused.

        Raises:
            PeftcError: `cannot-recompute` for what is asked beyond that, or of a graph that is run as it is written;
                `cannot-checkpoint` where a block cannot be run again by itself.
        """
        asked = {"every_n_layers": every_n_layers, "offload": offload, **(activation_checkpointing_kwargs or {})}
        if (reason := self._refusal(asked)) is not None:
            raise PeftcError(CannotRecompute(model=self.plan.sites.model, reason=reason))
        recompute(self, asked["every_n_layers"])

    def activation_checkpointing_disable(self) -> None:
        """Ends what `activation_checkpointing_enable` began."""
        recompute(self, 0)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """transformers' old name for `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """transformers' old name for `activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    def enable_input_require_grads(self) -> None:
        """What modules that are run again need for a gradient to reach them; here it does without."""

    def _refusal(self, asked: dict[str, Any]) -> str | None:
        """Why blocks cannot be computed again so; None where they can."""
        every = asked["every_n_layers"]
        if unknown := sorted(asked.keys() - {"every_n_layers", "offload"} - TORCHS):
            return f"{unknown[0]} is no option of torch.utils.checkpoint"
        if asked["offload"]:
            return "offload moves what modules keep, and the graph has none of its own"
        if asked.get("context_fn") is not None:
            return "context_fn chooses what is kept, which the graph's own plan does"
        if not isinstance(every, int) or every < 1:
            return f"every_n_layers is {every}"
        if not self.is_fused:
            return "with fuse=False a graph runs as it is written"
        return None if self.plan.sites.blocks else "it has none"

    # Generation

    def can_generate(self) -> bool:
        """Whether the model continues text."""
        return bool(getattr(self.base, "can_generate", bool)())

    @property
    def generation_config(self) -> Any:
        """The base model's, unless another was set."""
        return self.__dict__.get("own_generation_config", getattr(self.base, "generation_config", None))

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.__dict__["own_generation_config"] = config

    def continuation(self) -> Decoder:
        """What continues text; made when it is first asked for, for which the model is captured once more.

        Raises:
            PeftcError: `cannot-generate` for a model that does not; `in-parts` of one of which each process has a part.
        """
        needs_whole(self, "writing text")
        if (face := self.face()) is not self:
            return cast(Decoder, face.continuation())
        if not self.can_generate() or self.make_continuation is None:
            raise PeftcError(CannotGenerate(model=self.plan.sites.model))
        with LOCK:
            if self.continues_by is None:
                self.__dict__["continues_by"] = self.make_continuation(self)
        if self.continues_by is None:
            raise PeftcError(CannotGenerate(model=self.plan.sites.model))
        found: Decoder = self.continues_by
        return found

    def generate(self, *args: Any, tasks: Any = None, **kwargs: Any) -> Any:
        """transformers' `generate`, with all that it takes; nothing is dropped out, whatever the mode.

        Args:
            args: transformers' own.
            tasks: the task of each text, or None, in a list; that in use for all by default.
            kwargs: transformers' own.

        Raises:
            PeftcError: `cannot-generate` for a model that does not continue text; `in-parts` of a model of which each
                process has a part.
        """
        if (face := self.face(tasks)) is not self:
            face.__dict__["own_generation_config"] = self.generation_config
            with self.lying_together(tasks):
                return face.generate(*args, **kwargs)
        with self.continuation().holding(self):
            return view(self).generate(*args, **kwargs)

    def _continues(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call is one with a cache, or of a decoder alone."""
        return kwargs.get("labels") is None and (
            bool(kwargs.get("use_cache")) or any(kwargs.get(name) is not None for name in (*CACHES, "encoder_outputs"))
        )
