"""A compiled model that continues text: its programs, and the cache between their calls.

A cache is transformers' own: how it is reordered for beams, cropped or copied is its own affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from peftc.capture.cached import ENCODED, KEPT, LOGITS, Cached, pairs
from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.ir import get_attribute
from peftc.optimise.decoding.cuts import Programs
from peftc.optimise.decoding.program import Program
from peftc.optimise.decoding.room import EXPECTED
from peftc.runtime.errors import NoPadding, OtherCache, OtherMask

Given = dict[str, Any]

# What a caller may leave out, and may give where a model has no use for it.
FILLED = ("attention_mask", "decoder_attention_mask", "position_ids", "token_type_ids", KEPT)


class _BehindFront(DynamicLayer):
    """Keys and values of a text behind what stands in front of it, whose length is the text's."""

    def __init__(self, front: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.front = front

    def get_seq_length(self) -> int:
        """The tokens of the text itself."""
        return max(super().get_seq_length() - self.front, 0)


@dataclass
class Decoder:
    """Runs the programs of one compiled model.

    `device` is the type of where it lies, `front` how many positions stand in front of every text. `constants` are
    tensors of the programs that the model does not have.
    """

    model: str
    cached: Cached
    programs: Programs
    constants: Mapping[str, Tensor]
    seq2seq: bool
    device: str
    front: int = 0
    prepared: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    held: bool = False

    @property
    def keeps(self) -> bool:
        """Whether there is a cache: else a whole text runs for each token."""
        return bool(self.cached.parameter)

    @contextmanager
    def holding(self, module: nn.Module) -> Iterator[None]:
        """Takes the tensors of `module` for unchanged inside."""
        outer = self.held
        self._look(module)
        self.held = True
        try:
            yield
        finally:
            self.held = outer

    def _look(self, module: nn.Module) -> None:
        """Looks the model's tensors up, and prepares the programs: that they are the same as before nobody can tell."""
        if self.held:
            return
        programs = {id(each): each for each in (self.programs.begin, self.programs.go_on, self.programs.encode) if each}
        names = dict.fromkeys(name for each in programs.values() for name in each.tensors)
        known = {name: self._tensor(module, name).detach() for name in names}
        with torch.no_grad(), torch.autocast(self.device, enabled=False):
            self.prepared = {
                key: each.prepare(*(known[name] for name in each.tensors)) for key, each in programs.items()
            }

    def _tensor(self, module: nn.Module, name: str) -> Tensor:
        found: Tensor = self.constants[name] if name in self.constants else get_attribute(module, name)
        return found

    def _run(self, program: Program, given: Mapping[str, Any]) -> dict[str, Tensor]:
        prepared = self.prepared[id(program)]
        with torch.autocast(self.device, enabled=False):  # programs are of the model's own precision throughout
            values = program.run(*prepared, *(given[name] for name in program.inputs))
        return dict(zip(program.outputs, values, strict=True))

    @torch.no_grad()
    def encode(self, module: nn.Module, given: Given) -> Tensor:
        """What the encoder makes of its inputs, with what stands in front of them."""
        assert self.programs.encode is not None
        self._look(module)
        return self._run(self.programs.encode, given)[ENCODED]

    @torch.no_grad()
    def step(self, module: nn.Module, given: Given, cache: Cache | None) -> tuple[Tensor, Cache | None]:
        """Logits for new tokens, and the cache with what is kept of them.

        Args:
            module: the compiled model.
            given: inputs by name, as the model takes them; masks, positions and places of logits may be missing.
            cache: what an earlier call returned, or an empty one; it is changed. None keeps nothing.

        Raises:
            PeftcError: `other-cache` where a cache does not hold all that was read so far, token by token.
        """
        self._look(module)
        given = dict(given)
        if not self.keeps:
            return self._run(self.programs.begin, self._filled(given, 0))[LOGITS], None
        own, cross = self._parts(cache if cache is not None else self.empty())
        text = own.get_seq_length()
        kept = self._kept(own, self.cached.past) if text else {}
        given = self._filled(given, text)
        if not text:
            batch = given[self._tokens].shape[0]
            kept = dict(zip(self.cached.past, self._nothing(module, batch, own), strict=True))
        elif cross is not None:
            kept |= self._kept(cross, self.cached.crossed)
        found = self._run(self.programs.go_on if text else self.programs.begin, given | kept)
        if cache is None:
            return found[LOGITS], None
        self._keep(own, self.cached.past, found)
        if cross is not None and not text:
            assert isinstance(cache, EncoderDecoderCache)
            self._keep(cross, self.cached.crossed, found)
            cache.is_updated = dict.fromkeys(range(len(self.cached.cross)), True)
        return found[LOGITS], cache

    # Inputs

    @property
    def _tokens(self) -> str:
        return "decoder_input_ids" if self.seq2seq else "input_ids"

    def _filled(self, given: Given, text: int) -> Given:
        """All inputs of the programs but what is kept, where `text` tokens were read before."""
        known = {*self.programs.begin.inputs, *self.programs.go_on.inputs, *FILLED, self._tokens, "input_ids"}
        if (unknown := given.keys() - known) or self._tokens not in given:
            what = f"takes no {', '.join(sorted(unknown))}" if unknown else f"needs {self._tokens}"
            raise TypeError(f"a compiled {self.model} that continues text {what}")
        tokens = given[self._tokens]
        batch, new = tokens.shape
        front = self.front if text else 0
        mask = "decoder_attention_mask" if self.seq2seq else "attention_mask"
        if given.get(mask) is None:
            given[mask] = tokens.new_ones(batch, text + new)
        if given[mask].shape != (batch, text + new):
            raise PeftcError(
                OtherMask(model=self.model, name=mask, given=given[mask].shape, wanted=(batch, text + new))
            )
        if mask not in self.programs.begin.inputs and not bool(given[mask].all()):
            raise PeftcError(NoPadding(model=self.model))
        if front:
            given[mask] = torch.cat([given[mask].new_ones(batch, front), given[mask]], 1)
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.arange(text, text + new, device=tokens.device)[None]
        given["position_ids"] = (positions + front if front else positions).expand(batch, -1)
        if given.get("token_type_ids") is None:
            given["token_type_ids"] = torch.zeros_like(tokens)
        return given | {KEPT: self._places(given.get(KEPT), new, tokens) + (self.front - front)}

    @staticmethod
    def _places(kept: Any, new: int, tokens: Tensor) -> Tensor:
        """Of which of `new` tokens the logits are wanted: the last ones by their number, 0 for all; or these places."""
        if isinstance(kept, Tensor):
            return kept
        return torch.arange(new - kept if kept else 0, new, device=tokens.device)

    # The cache

    def empty(self, expected: int = 0) -> Cache:
        """A cache that nothing was put into; `expected` is how many tokens will be, 0 where that is not known."""
        own = DynamicCache()
        if expected:
            setattr(own, EXPECTED, expected)
        return EncoderDecoderCache(own, DynamicCache()) if self.cached.cross else own

    def _nothing(self, module: nn.Module, batch: int, cache: Cache) -> Iterator[Tensor]:
        expected = self.front + getattr(cache, EXPECTED, -self.front)
        like = next(p for p in module.parameters() if p.is_floating_point()).detach()
        for heads, wide, values_wide in self.cached.own:
            for width in (wide, values_wide):
                nothing = like.new_empty(batch, heads, 0, width)
                setattr(nothing, EXPECTED, expected)
                yield nothing

    def _parts(self, cache: Cache) -> tuple[Cache, Cache | None]:
        """What is kept of the text, and of what an encoder read."""
        own, cross = (
            (cache.self_attention_cache, cache.cross_attention_cache)
            if isinstance(cache, EncoderDecoderCache) else (cache, None)
        )  # fmt: skip
        if (cross is not None) is not bool(self.cached.cross):
            raise PeftcError(OtherCache(model=self.model, kind=type(cache).__name__))
        for part in (own, cross):
            if part is not None:
                self._plain(part, part is own)
        return own, cross

    def _plain(self, cache: Cache, own: bool) -> None:
        """Layers that keep every token in place of those that have nothing yet, or have let nothing go."""
        count = len(self.cached.own if own else self.cached.cross)
        while len(cache.layers) < count:
            cache.layers.append(DynamicLayer())
        for place, layer in enumerate(_layers(cache)):
            if type(layer) is not (_BehindFront if own and self.front else DynamicLayer):
                cache.layers[place] = self._keeping_all(layer, self.front if own else 0)

    def _keeping_all(self, layer: Any, front: int) -> DynamicLayer:
        length = layer.get_seq_length() if layer.is_initialized else 0
        there: Any = layer.keys if isinstance(layer, DynamicLayer) else None
        if not isinstance(layer, DynamicLayer) or (length and there.shape[-2] < length + front):
            raise PeftcError(OtherCache(model=self.model, kind=type(layer).__name__))
        plain: Any = _BehindFront(front) if front else DynamicLayer()
        if length:
            plain.lazy_initialization(layer.keys, layer.values)
            plain.keys, plain.values = layer.keys, layer.values
        return cast(DynamicLayer, plain)

    @staticmethod
    def _kept(cache: Cache, names: tuple[str, ...]) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        for (key, values), layer in zip(pairs(names), _layers(cache), strict=True):
            kept |= {key: layer.keys, values: layer.values}
        return kept

    @staticmethod
    def _keep(cache: Cache, names: tuple[str, ...], found: Mapping[str, Tensor]) -> None:
        for (key, values), layer in zip(pairs(names), _layers(cache), strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(found[key], found[values])
            layer.keys, layer.values = found[key], found[values]


def _layers(cache: Any) -> list[Any]:
    layers: list[Any] = cache.layers
    return layers
