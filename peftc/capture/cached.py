"""A call with a key-value cache, to capture with: new tokens, and the keys and values of those before them.

The cache itself is no input of a graph: its tensors are, one by one, and come back longer by the new tokens. Those of a
decoder's cross attention are made of the encoder's result, and come back alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from peftc.capture.examples.asking import fake_mode_of, without_numbers
from peftc.capture.examples.draft import BATCH
from peftc.capture.inputs import Example
from peftc.capture.untouched import untouched
from peftc.diagnostics import debug

# Unlike one another, the batch and other sizes, so that none is taken for another.
BEFORE, NEW = 5, 3

CACHES = ("cache", "past_key_values")  # what transformers calls it, in the order in which it is looked for
LOGITS, ENCODED = "logits", "encoder_last_hidden_state"
KEPT = "logits_to_keep"  # the places [n] whose logits are computed, where a model knows that

Forward = Callable[..., Any]
Shape = tuple[int, int, int]  # heads, width of a key, width of a value


class _Held(DynamicLayer):
    """Keys and values of which there may be none: how many is never asked."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def get_seq_length(self) -> int:
        keys: Any = self.keys
        length: int = keys.shape[-2]
        return length


class _Crossed(DynamicLayer):
    """What a cross attention makes of an encoder's result."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


@dataclass(frozen=True)
class Cached:
    """How a model is called with a cache.

    `parameter` is what its forward calls the cache, "" where there is none to be had. `own` and `cross` are the shapes
    that its layers keep of a token, of the text itself and of what an encoder read.
    """

    parameter: str
    own: tuple[Shape, ...] = ()
    cross: tuple[Shape, ...] = ()

    @property
    def past(self) -> tuple[str, ...]:
        """The names of the tensors that are kept of the text, in order."""
        return tuple(_names("past", len(self.own)))

    @property
    def crossed(self) -> tuple[str, ...]:
        """The names of the tensors that are kept of what an encoder read."""
        return tuple(_names("cross", len(self.cross)))

    def call(self, forward: Forward, given: dict[str, Any]) -> dict[str, Tensor]:
        """Logits and what is kept, by name, from inputs and what was kept."""
        rest = {name: tensor for name, tensor in given.items() if name not in self.past}
        side = "decoder_" if self.cross else ""
        if not self.parameter:
            return {LOGITS: forward(**rest).logits}
        tokens, mask = rest[f"{side}input_ids"], rest.get(f"{side}attention_mask")
        if mask is not None:  # an entry for every token, old or new
            torch._check(mask.shape[1] == given[self.past[0]].shape[2] + tokens.shape[1])
        own, cross = DynamicCache(), DynamicCache()
        own.layers += [_Held(given[key], given[values]) for key, values in pairs(self.past)]
        cross.layers += [_Crossed() for _ in self.cross]  # type: ignore[no-untyped-call]
        cache = EncoderDecoderCache(own, cross) if self.cross else own
        found = forward(**rest | {self.parameter: cache, "use_cache": True})
        kept = {LOGITS: found.logits} | ({ENCODED: found[ENCODED]} if self.cross else {})
        layers: Any
        for names, layers in ((self.past, own.layers), (self.crossed, cross.layers)):
            for (key, values), layer in zip(pairs(names), layers, strict=True):
                kept |= {key: layer.keys, values: layer.values}
        return kept


def _names(kind: str, layers: int) -> Iterator[str]:
    for layer in range(layers):
        yield f"{kind}_key_{layer}"
        yield f"{kind}_value_{layer}"


def pairs(names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The names of the keys and values of each layer."""
    return zip(names[::2], names[1::2], strict=True)


@dataclass(frozen=True)
class CachedExample(Example):
    """Inputs to trace a call with a cache with, and how to make it."""

    cached: Cached = field(default_factory=lambda: Cached(""))

    @property
    def past(self) -> tuple[str, ...]:
        return self.cached.past

    def called(self, forward: Forward, given: dict[str, Any]) -> Any:
        return self.cached.call(forward, given | self.constants)

    def without_cache(self) -> CachedExample:
        """The same call, of a whole text."""
        kwargs = {name: tensor for name, tensor in self.kwargs.items() if name not in self.cached.past}
        mask = "decoder_attention_mask" if "decoder_input_ids" in kwargs else "attention_mask"
        if mask in kwargs:
            kwargs[mask] = kwargs[mask][:, :NEW]
        return replace(self, kwargs=kwargs, cached=Cached(""), made=False)

    def dynamic_shapes(self) -> Any:
        before = Dim("before")
        past = {name: {0: Dim.AUTO, 2: before} for name in self.cached.past}
        return {
            name: past.get(name, dict.fromkeys(range(min(2, tensor.dim())), Dim.AUTO))
            for name, tensor in self.kwargs.items()
        }


class _AsCompiled(CachedExample):
    """Inputs whose sizes are open as those of a training step are."""

    def dynamic_shapes(self) -> Any:
        return Example.dynamic_shapes(self)


def as_compiled(example: Example) -> CachedExample:
    """A call with the inputs that a model was compiled with but the labels, and no cache."""
    kwargs = {name: tensor for name, tensor in example.kwargs.items() if name != "labels"}
    return _AsCompiled(kwargs=kwargs, constants=example.constants, config=example.config, sizes=example.sizes)


def cached_example(model: PreTrainedModel, example: Example) -> CachedExample | None:
    """What to capture a call with a cache with; without one, where the model's cannot be captured.

    Args:
        model: of a class that generates text.
        example: what it was compiled with.

    Returns:
        None for a model that reads no tokens.
    """
    accepts = inspect.signature(type(model).forward).parameters
    seq2seq = bool(model.config.is_encoder_decoder)
    given = {name: value for name, value in example.kwargs.items() if not name.startswith(("labels", "decoder_"))}
    if not seq2seq and set(given) - {"input_ids", "attention_mask", "token_type_ids", "position_ids"}:
        return None
    parameter = next((name for name in CACHES if name in accepts), "")
    cached = Cached("", *_kept(model, given, parameter)) if parameter else Cached("")
    cached = replace(cached, parameter=parameter if cached.own else "")
    total = BEFORE + NEW if cached.own else NEW
    side = "decoder_" if seq2seq else ""
    device = model.device
    made = {f"{side}input_ids": torch.ones(BATCH, NEW, dtype=torch.long, device=device)}
    if f"{side}attention_mask" in accepts:
        made[f"{side}attention_mask"] = torch.ones(BATCH, total, dtype=torch.long, device=device)
    if not seq2seq and "position_ids" in accepts:
        made["position_ids"] = torch.arange(total - NEW, total, device=device).repeat(BATCH, 1)
    if not seq2seq and "token_type_ids" in given:
        made["token_type_ids"] = torch.zeros(BATCH, NEW, dtype=torch.long, device=device)
    if KEPT in accepts:
        made[KEPT] = torch.arange(1, NEW, device=device)
    for (key, values), (heads, wide, values_wide) in zip(pairs(cached.past), cached.own, strict=True):
        made[key] = torch.zeros(BATCH, heads, BEFORE, wide, dtype=model.dtype, device=device)
        made[values] = torch.zeros(BATCH, heads, BEFORE, values_wide, dtype=model.dtype, device=device)
    kwargs = given | made if seq2seq else made
    return CachedExample(kwargs=kwargs, constants=example.constants, config=example.config, cached=cached)


def _kept(
    model: PreTrainedModel, given: dict[str, Tensor], parameter: str
) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """The shapes that the layers keep, of the text and of what an encoder read; none where it is something else."""
    seq2seq = bool(model.config.is_encoder_decoder)
    for run in (without_numbers, _for_real):
        own, cross = DynamicCache(), DynamicCache()
        inputs: dict[str, Any] = {"use_cache": True, parameter: EncoderDecoderCache(own, cross) if seq2seq else own}
        if seq2seq:
            inputs["decoder_input_ids"] = torch.ones(BATCH, NEW, dtype=torch.long, device=model.device)
        try:
            with untouched(model), torch.no_grad():
                run(model, given, inputs)
        except Exception as error:  # a forward that wants another cache, or none, raises anything
            debug.tell(1, [f"{type(model).__name__} with a cache: {error}"])
            continue
        break
    else:
        return (), ()
    layers: list[Any] = [*own.layers, *cross.layers]
    if not own.layers or not all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers):
        return (), ()
    if not all(isinstance(layer.keys, Tensor) and layer.keys.dim() == 4 for layer in layers):
        return (), ()
    return _shapes(own), _shapes(cross)


def _for_real(model: PreTrainedModel, given: dict[str, Tensor], more: dict[str, Any]) -> None:
    """Where an operation refuses tensors without numbers that it takes with them."""
    if fake_mode_of(model) is not None:
        raise TypeError("it has no numbers")
    with torch.random.fork_rng():
        model.eval()(**given, **more)


def _shapes(cache: Any) -> tuple[Shape, ...]:
    return tuple(
        (int(layer.keys.shape[1]), int(layer.keys.shape[3]), int(layer.values.shape[3])) for layer in cache.layers
    )
