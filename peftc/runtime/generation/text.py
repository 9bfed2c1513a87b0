"""`generate` of a compiled model is transformers' own, run on a view of the model as its base's class.

How a class prepares a step for itself lies in its methods, which call those of the classes above: so they are called on
an object of that class, whose forward is the compiled model's.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from peftc.capture.cached import CACHES, ENCODED
from peftc.diagnostics.diagnostic import PeftcError
from peftc.runtime.errors import NotCaptured, OtherCache
from peftc.runtime.holder import Holder

# Of the base model's attributes: hooks of accelerate that move inputs about.
NOT_SHARED = ("hf_device_map", "_hf_hook", "_old_forward", "forward")
# What a caller may ask for beside the logits, and is not in the graph.
INSIDE = ("output_attentions", "output_hidden_states", "output_router_logits")
MOST = 1024  # tokens that memory is taken for ahead: a text may end long before it may be
SAME_RESULT = (None, "dynamic", "dynamic_full", "hybrid", "static", "offloaded", "sliding_window")


class _View:
    """What a compiled model's class gives in place of its base's."""

    compiled: Holder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return continued(self.compiled, args, kwargs)

    @property
    def device(self) -> torch.device:
        """Where the compiled model's parameters are."""
        return self.compiled.device

    def get_encoder(self, *_: Any, **__: Any) -> Any:
        """What makes an encoder's result of its inputs."""
        return _Encoder(self.compiled, super().get_encoder())  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """The cache keeps all tokens, whatever a window leaves to be seen of them."""
        decoder = self.compiled.continuation()
        if model_kwargs.get(decoder.cached.parameter) is None and config.use_cache is not False and decoder.keeps:
            if config.cache_implementation not in SAME_RESULT:
                raise PeftcError(OtherCache(model=self.compiled.plan.sites.model, kind=config.cache_implementation))
            most = kwargs.get("max_cache_length", args[-1] if args else 0)
            model_kwargs[decoder.cached.parameter] = decoder.empty(min(most, MOST) if isinstance(most, int) else 0)
        elif not decoder.keeps:
            config.use_cache = False

    def _valid_auto_compile_criteria(self, *_: Any, **__: Any) -> bool:
        return False


class _Encoder:
    """The encoder of a compiled model, called as the base model's."""

    def __init__(self, compiled: Holder, base: nn.Module) -> None:
        self.compiled = compiled
        self.base = base
        self.forward = base.forward  # by whose signature its inputs are chosen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def __call__(self, **given: Any) -> BaseModelOutput:
        refuse_insides(self.compiled, given)
        decoder = self.compiled.continuation()
        return BaseModelOutput(last_hidden_state=decoder.encode(self.compiled, given))


def refuse_insides(compiled: Holder, given: dict[str, Any]) -> None:
    """Refuses what is in no graph."""
    if asked := [name for name in INSIDE if given.get(name)]:
        raise PeftcError(NotCaptured(model=compiled.plan.sites.model, name=asked[0]))


def continued(compiled: Holder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call with a cache, or of a decoder on what an encoder gave: the base model's kind of result."""
    given = dict(zip(inspect.signature(type(compiled.base).forward).parameters, (None, *args), strict=False)) | kwargs
    refuse_insides(compiled, given)
    decoder = compiled.continuation()
    given = {name: value for name, value in given.items() if value is not None}
    caches = [given.pop(name) for name in CACHES if name in given]
    keeps = bool(given.pop("use_cache", True)) or bool(caches)
    encoded = given.pop("encoder_outputs", None)
    for name in ("return_dict", *INSIDE):
        given.pop(name, None)
    if decoder.seq2seq:
        given[ENCODED] = encoded[0] if encoded is not None else decoder.encode(compiled, given)
    cache = caches[0] if caches else decoder.empty() if keeps and decoder.keeps else None
    logits, cache = decoder.step(compiled, given, cache)
    found: dict[str, Any] = {"logits": logits}
    if cache is not None:
        found[decoder.cached.parameter] = cache
    if decoder.seq2seq:
        found[ENCODED] = given[ENCODED]
    kind: Any = compiled.convention.result.type
    return kind(**found)


@cache
def _class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return continued(self.compiled, args, kwargs)

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return type(base.__name__, (_View, base), {"forward": forward, "__module__": base.__module__})


def view(compiled: Holder) -> Any:
    """The compiled model as an object of its base's class: only what generates text is meant to be called of it."""
    base = compiled.base
    shown = object.__new__(_class(type(base)))  # type: ignore[arg-type]
    shown.__dict__.update({name: value for name, value in vars(base).items() if name not in NOT_SHARED})
    shown.__dict__.update(compiled=compiled, training=False, generation_config=compiled.generation_config)
    return shown
