"""The weights of a checkpoint, read one at a time.

Its names are matched and its tensors converted by transformers' own rules (renamed prefixes, experts stacked
into one tensor, fused projections split, precision), so that what is read here is what `from_pretrained` would have put
into the model.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from peftc.capture.checkpoints.bitsandbytes import Packed
from peftc.capture.checkpoints.errors import ChangedCheckpoint, OtherShape
from peftc.capture.checkpoints.ondisk import OnDisk, Readable
from peftc.diagnostics.diagnostic import PeftcError

WHOLE_NUMBERS = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"}  # as safetensors calls them


@dataclass(frozen=True)
class Recipe:
    """What some parameters are made of: tensors of the checkpoint, as they are or through a conversion.

    `first` is the first of `makes`. `sources`: pairs of the conversion's pattern (the key itself without one) and the
    key, in the order the conversion takes them.
    """

    first: str
    makes: tuple[str, ...]
    converter: WeightConverter | None
    dtype: torch.dtype
    sources: list[tuple[str, str]] = field(default_factory=list)


class Checkpoint:
    """A checkpoint beside the model on the meta device that it is for: any parameter, by its name, when asked for.

    `transforms` are the model's weight transforms, `precisions` the patterns of parameters with a precision of their
    own, both as transformers has them. `digests` holds the SHA-256 of each parameter that was read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tensors: Mapping[str, Readable],
        transforms: Iterable[Any],
        precisions: Mapping[str, torch.dtype],
    ) -> None:
        self.model = model
        self.tensors = dict(tensors)
        self.digests: dict[str, str] = {}
        self.on_read: Callable[[str], None] = lambda _name: None
        self._recipes = _recipes(model, tensors, list(transforms), precisions)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._makers = {name: recipe for recipe in self._recipes for name in recipe.makes}
        for recipe in self._recipes:
            _refuse_whole_numbers(recipe, self.tensors)
            key, owner = recipe.sources[0][1], recipe.first.rpartition(".")[0]
            packed = self.tensors[key]
            if isinstance(packed, Packed) and isinstance(model.get_submodule(owner), Conv1D):
                self.tensors[key] = replace(packed, turned=True)

    def __contains__(self, name: str) -> bool:
        return name in self._makers

    def precision(self, name: str) -> torch.dtype | None:
        """The dtype that a parameter is read in; None for one that the checkpoint does not have."""
        return self._makers[name].dtype if name in self else None

    def keys_without(self, left: set[str]) -> list[str]:
        """What has to be read of the checkpoint for a model that does without the parameters `left`."""
        unread = {key for recipe in self._recipes if left.issuperset(recipe.makes) for _pattern, key in recipe.sources}
        return [key for key in self.tensors if key not in unread]

    def misshapen(self, names: Iterable[str]) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """Of some parameters those that files have in another shape, as far as can be known unread: both shapes."""
        found = []
        for name in names:
            recipe = self._makers[name]
            source, expected = self.tensors[recipe.sources[0][1]], tuple(self._shapes[name])
            if recipe.converter is None and isinstance(source, OnDisk) and source.shape != expected:
                found.append((name, source.shape, expected))
        return found

    def read(self, name: str) -> Tensor:
        """One parameter, as `from_pretrained` would have set it; the caller lets go of it.

        Raises:
            PeftcError: `changed-checkpoint` if it cannot be read, or not as it was before; `other-shape`.
        """
        self.on_read(name)
        give_back()  # the weight before and what packing it took
        try:
            tensor = self._made(self._makers[name], name)
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:  # the last: parts that do not fit
            raise PeftcError(ChangedCheckpoint(weight=name, reason=str(error))) from error
        if tensor.shape != self._shapes[name]:
            reference, expected = str(self.model.name_or_path), list(self._shapes[name])
            problem = OtherShape(reference=reference, weight=name, found=list(tensor.shape), expected=expected)
            raise PeftcError(problem)
        found = digest(tensor)
        if self.digests.setdefault(name, found) != found:
            raise PeftcError(ChangedCheckpoint(weight=name, reason="it has other numbers than before"))
        return tensor

    def packed(self, name: str) -> dict[str, Tensor] | None:
        """bitsandbytes' state dict of the layer whose weight this is, where the checkpoint has it packed.

        For who has just read it: that is where what cannot be right is found.
        """
        recipe = self._makers.get(name)
        if recipe is None or recipe.converter is not None:
            return None
        source = self.tensors[recipe.sources[0][1]]
        return source.state() if isinstance(source, Packed) else None

    def _made(self, recipe: Recipe, name: str) -> Tensor:
        if recipe.converter is None:
            return self._source(recipe.sources[0][1], recipe.dtype)
        converter = deepcopy(recipe.converter)
        for pattern, key in recipe.sources:
            source: Any = partial(self._source, key, recipe.dtype)  # `convert` calls what is no future
            converter.add_tensor(recipe.first, key, pattern, source)
        made = converter.convert(recipe.first, model=self.model, config=self.model.config)[name]
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor

    def _source(self, key: str, dtype: torch.dtype) -> Tensor:
        return self.tensors[key][...].to(dtype)


def digest(tensor: Tensor) -> str:
    """SHA-256 over a tensor's numbers, in the order of its indices."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


def give_back() -> None:
    """Returns freed memory to the system, where the C library (glibc) would keep it.

    Between the packed weights, which stay, it keeps the room of the dense ones: a quarter of what is packed.
    """
    if (trim := getattr(_libc(), "malloc_trim", None)) is not None:
        trim(0)


@cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def _refuse_whole_numbers(recipe: Recipe, tensors: Mapping[str, Readable]) -> None:
    """Codes that lost what they stand for would become weights.

    Raises:
        ValueError: where a weight is to be made of integers.
    """
    for _pattern, key in recipe.sources:
        source = tensors[key]
        if recipe.dtype.is_floating_point and isinstance(source, OnDisk) and source.kind in WHOLE_NUMBERS:
            raise ValueError(f"{key} is {source.kind} in the checkpoint, and nothing there says what packed it")


def _recipes(
    model: PreTrainedModel, tensors: Iterable[str], transforms: list[Any], precisions: Mapping[str, torch.dtype]
) -> list[Recipe]:
    """How the model's parameters come out of the tensors, by the steps of transformers' own loader."""
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected = model.state_dict()
    prefix = model.base_model_prefix
    dtype_of = partial(_precision, expected, precisions)
    recipes: dict[str, Recipe] = {}
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=expected)
        if name not in expected:
            continue
        if name not in recipes:
            converter = by_pattern[pattern] if pattern is not None else None
            recipes[name] = Recipe(name, _made(name, converter, expected), converter, dtype_of(name))
        recipes[name].sources.append((pattern or key, key))
    return list(recipes.values())


def _made(first: str, converter: WeightConverter | None, expected: Mapping[str, Tensor]) -> tuple[str, ...]:
    """All the parameters that a conversion makes, from the name of the first."""
    if converter is None:
        return (first,)
    named, *others = converter.target_patterns
    names = (first, *(first.replace(named, other) for other in others))
    return tuple(dict.fromkeys(name for name in names if name in expected))


def _precision(expected: Mapping[str, Tensor], precisions: Mapping[str, torch.dtype], name: str) -> torch.dtype:
    if precisions:
        pattern, patterns, _ = build_glob_alternation(list(precisions))
        if (found := pattern.search(name)) is not None and found.lastgroup is not None:
            return precisions[patterns[found.lastgroup]]
    return expected[name].dtype
