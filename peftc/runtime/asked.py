"""What others ask of a model: transformers' `generate` and pipelines, TRL's trainers."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from typing import Any, cast

from torch import nn

from peftc.capture.cached import CACHES
from peftc.diagnostics.diagnostic import PeftcError
from peftc.runtime.backbone import Backbone, head
from peftc.runtime.errors import CannotGenerate
from peftc.runtime.generation.decoder import Decoder
from peftc.runtime.generation.text import view
from peftc.runtime.holder import Holder

LOCK = RLock()  # one captures at a time


class Asked(Holder):
    """A compiled model as far as others look at it without calling it."""

    make_continuation: Callable[[Any], Decoder | None] | None
    continues_by: Decoder | None

    def face(self, tasks: Any = None) -> Any:
        """What runs a call."""
        raise NotImplementedError

    def lay_together(self, tasks: Any) -> None:
        """Puts the tensors of tasks where a batch of several of them reads them soonest."""
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
    def is_gradient_checkpointing(self) -> bool:
        """Whether modules compute again what they keep: the graph does so by its own plan."""
        return False

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
            PeftcError: `cannot-generate` for a model that does not.
        """
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
            PeftcError: `cannot-generate` for a model that does not continue text.
        """
        if tasks is not None:
            self.lay_together(tasks)
        if (face := self.face(tasks)) is not self:
            face.__dict__["own_generation_config"] = self.generation_config
            return face.generate(*args, **kwargs)
        with self.continuation().holding(self):
            return view(self).generate(*args, **kwargs)

    def _continues(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call is one with a cache, or of a decoder alone."""
        return kwargs.get("labels") is None and (
            bool(kwargs.get("use_cache")) or any(kwargs.get(name) is not None for name in (*CACHES, "encoder_outputs"))
        )
