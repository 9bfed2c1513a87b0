"""Example inputs for capture: given by the user, or made from what a transformers model says of itself.

Only names that transformers itself fixes for all models are used (`main_input_name`, `input_ids`, `labels`, …);
what the labels look like is read off the logits, never off the class's name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from transformers import Cache, PreTrainedModel
from transformers.utils.generic import ModelOutput

from peftc.capture.errors import NeedsExample
from peftc.capture.examples.made import SEEN, made_for
from peftc.capture.examples.settled import Settled, are_sizes
from peftc.capture.texts import POSITIONS
from peftc.diagnostics.diagnostic import PeftcError

PROBLEM = "problem_type"  # a setting that, where it is none, the labels decide at the first call


class Sizes(Enum):
    """Which sizes of the inputs a graph is to be for: more than those of an example."""

    USUAL = auto()  # any batch, any number of tokens
    ANY = auto()  # all that the model leaves open
    FIXED = auto()  # the example's alone


@dataclass(frozen=True)
class Example:
    """Inputs to trace with. `constants` are passed but not traced; `config` is set while tracing.

    `config` is None for a plain `nn.Module`. Batch and sequence must not be 1, which would be baked in, unless all
    `sizes` are to be fixed. One that is `made` was not given, and another may do.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    sizes: Sizes = Sizes.USUAL
    made: bool = False

    @property
    def past(self) -> tuple[str, ...]:
        """The names of inputs that are keys and values of earlier tokens."""
        return ()

    def called(self, forward: Callable[..., Any], given: dict[str, Any]) -> Any:
        """What is traced: a model's own `forward` on inputs by name; a cache that it makes unasked is no result."""
        result = forward(**given, **self.constants)
        if isinstance(result, ModelOutput) and any(isinstance(value, Cache) for value in result.values()):
            return type(result)(**{name: value for name, value in result.items() if not isinstance(value, Cache)})
        return result

    def like(self, given: Mapping[str, Any]) -> Iterator[Example]:
        """Examples of the sizes of other inputs, the most general first.

        There is none where the inputs are not tensors, each with a name or a place.
        """
        values = list(_apart(item.detach() if isinstance(item, torch.Tensor) else item for item in given.values()))
        if not all(isinstance(value, torch.Tensor) for value in (*self.args, *self.kwargs.values(), *values)):
            return
        args, rest = tuple(values[: len(self.args)]), dict(zip(given, values, strict=True))
        kwargs = {name: rest[name] for name in self.kwargs if name in rest}
        if self.config is not None:  # other inputs that a transformers model takes
            kwargs |= {name: value for name, value in rest.items() if name not in kwargs}
        if len(args) + len(kwargs) == len(values):
            general = self._with(tuple(_two_rows(value) for value in args), _doubled(kwargs))
            yield replace(general, sizes=Sizes.ANY)
            yield general
            yield replace(self._with(args, kwargs), sizes=Sizes.FIXED)

    def _with(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Example:
        """With other inputs, and the sizes that are among them as constants instead of those that are."""
        kept = {name: value for name, value in self.constants.items() if not are_sizes(name, value)}
        traced, sizes = _sizes_apart(kwargs)
        config = self.config
        if config and PROBLEM in config and "labels" in traced:
            config = {**config, PROBLEM: _problem(traced["labels"])}
        return replace(self, args=args, kwargs=traced, constants=kept | sizes, config=config, made=False)

    def dynamic_shapes(self) -> Any:
        """Usually batch is dynamic everywhere; a second dimension is where it counts tokens (integers)."""
        if self.sizes is Sizes.FIXED:
            return None
        guess = self.sizes is Sizes.ANY or self.config is None or not self._only_texts
        dimensions = [self._dynamic(tensor, guess) for tensor in (*self.args, *self.kwargs.values())]
        return tuple(dimensions) if self.args else dict(zip(self.kwargs, dimensions, strict=True))

    @property
    def _only_texts(self) -> bool:
        """Whether no size but those of the texts may be bound to how long they are."""
        if any(isinstance(value, torch.Tensor) for value in self.constants.values()):
            return False
        seen = [tensor for tensor in self.kwargs.values() if tensor.is_floating_point()]
        mask = self.kwargs.get("attention_mask")
        frames = mask.shape[1:2] if mask is not None else ()  # of a sound
        masked = any(length in tensor.shape[1:] for length in frames for tensor in seen)
        return not (seen and ("input_ids" in self.kwargs or masked))

    def _dynamic(self, tensor: Any, guess: bool) -> dict[int, Any] | None:
        """The dynamic dimensions of an input; those that are a guess are fixed where the model fixes them."""
        if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0:
            return None
        counted = 1 if tensor.is_floating_point() else tensor.dim() if guess else min(2, tensor.dim())
        dims = range(tensor.dim() if self.sizes is Sizes.ANY else counted)
        return dict.fromkeys(dims, Dim.AUTO if guess else Dim.DYNAMIC)


def example_inputs(model: nn.Module, example: Any = None) -> Example:
    """The user's `example` (a tensor, a tuple or a dict) or, for a transformers model, one made for it.

    Raises:
        PeftcError: `needs-example` where neither is to be had.
    """
    if isinstance(example, Example):
        return example
    if isinstance(model, PreTrainedModel):
        if example is not None and not isinstance(example, Mapping):
            raise PeftcError(NeedsExample(model=type(model).__name__))
        if example is not None:
            given = Settled.of(model, {}).with_positions(_by_name(example))
            return _with_conventions(model, *_sizes_apart(given))
        draft = made_for(model)
        return replace(_with_conventions(model, draft.given, draft.fixed), made=True)
    if example is None:
        raise PeftcError(NeedsExample(model=type(model).__name__))
    if isinstance(example, dict):
        return Example(kwargs=_by_name(example))
    args = example if isinstance(example, tuple | list) else (example,)
    return Example(args=tuple(map(_two_rows, _apart(args))))


def text_alone(model: nn.Module, example: Example) -> Example | None:
    """Another example, of what a model reads, for one that was made of what it sees or hears as well."""
    if not example.made or "input_ids" not in example.kwargs or SEEN.keys().isdisjoint(example.kwargs):
        return None
    assert isinstance(model, PreTrainedModel)
    try:
        draft = made_for(model, reads_alone=True)
    except PeftcError:
        return None
    return _with_conventions(model, draft.given, draft.fixed)


def _by_name(example: Mapping[str, Any]) -> dict[str, Any]:
    return _doubled(dict(zip(example, _apart(example.values()), strict=True)))


def _doubled(given: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of one, doubled; where sizes say what the rows of an image are, all together."""
    if not any(are_sizes(name, value) for name, value in given.items()):
        return {name: _two_rows(value) for name, value in given.items()}
    tokens = given.get("input_ids")
    if not isinstance(tokens, torch.Tensor) or tokens.shape[0] != 1:
        return dict(given)
    rows = {name: 1 if name == POSITIONS and value.dim() > 2 else 0 for name, value in given.items()}
    return {name: torch.cat([value, value], rows[name]) for name, value in given.items()}


def _sizes_apart(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What is traced, and the sizes that a graph is for."""
    sizes = {name: value.cpu() for name, value in given.items() if are_sizes(name, value)}
    return {name: value for name, value in given.items() if name not in sizes}, sizes


def _apart(given: Iterable[Any]) -> Iterator[Any]:
    """No tensor twice: of two inputs that are one object torch.export makes one in the graph."""
    seen: set[int] = set()
    for item in given:
        twice = isinstance(item, torch.Tensor) and id(item) in seen
        seen.add(id(item))
        yield item.clone() if twice or (isinstance(item, torch.Tensor) and item.is_inference()) else item


def _two_rows(tensor: Any) -> Any:
    """A batch of one, doubled: torch.export bakes a size of 1 into the graph."""
    if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[0] == 1:
        return torch.cat([tensor, tensor])
    return tensor


def _problem(labels: torch.Tensor) -> str | None:
    """Which loss transformers chooses for labels of that kind; None where the model is to say, as for several each."""
    if labels.dim() != 1:
        return None
    return "regression" if labels.is_floating_point() else "single_label_classification"


def _with_conventions(
    model: PreTrainedModel, kwargs: dict[str, torch.Tensor], fixed: dict[str, torch.Tensor]
) -> Example:
    """No cache in a training graph, and the loss that the labels' type asks for, fixed before tracing."""
    accepts = inspect.signature(type(model).forward).parameters
    constants: dict[str, Any] = fixed | ({"use_cache": False} if "use_cache" in accepts else {})
    config: dict[str, Any] = {}
    labels = kwargs.get("labels")
    if labels is not None and hasattr(model.config, PROBLEM) and getattr(model.config, PROBLEM) is None:
        config[PROBLEM] = _problem(labels)
    return Example(kwargs=kwargs, constants=constants, config=config)
