"""What a method is: one class that says what it learns, what it means and how it runs; and the registry of them.

A method is written once, in one file under `passes/methods`. Its fields become the language's parameters, the
command line's help and the README's table; its `state` becomes the counts of `peftc plan`; its `delta` becomes
merging and the tests' oracle; its `rewrite` is traced and spliced into the graph.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Any, ClassVar, TypeVar, cast, get_args, get_type_hints

import torch
from torch import Tensor

from peftc.site import Linear, Site

Init = Callable[[Tensor], Tensor]


class Stage(enum.IntEnum):
    """When a method's rewrite runs, whatever the order in the file. Within a stage, the file's order holds."""

    WEIGHT = 1
    OUTPUT = 2
    MODULE = 3
    ATTENTION = 4
    SEQUENCE = 5


@dataclass(frozen=True, slots=True)
class State:
    """One tensor that a method keeps at a site. `init` fills it in place, as `torch.nn.init` does."""

    shape: tuple[int, ...]
    init: Init = torch.nn.init.zeros_
    trainable: bool = True


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter of a method, as the language, the help and the diagnostics see it."""

    name: str
    kind: type
    default: Any
    doc: str
    min: float | None = None
    max: float | None = None
    above: float | None = None
    choices: tuple[str, ...] | None = None
    alias: str | None = None
    optional: bool = False

    def problem(self, given: Any) -> str | None:
        """Why `given` cannot be this parameter's value, or None."""
        if given is None and self.optional:
            return None
        accepted = (int, float) if self.kind is float else self.kind
        if isinstance(given, bool) != (self.kind is bool) or not isinstance(given, accepted):
            return f"expects {self.expects}, not {_described(given)}"
        if self.choices and given not in self.choices:
            return f"must be one of {', '.join(self.choices)}"
        if isinstance(given, int | float) and not (self._least <= given <= self._most):
            return f"must be {self.range}"
        if self.above is not None and isinstance(given, int | float) and not given > self.above:
            return f"must be {self.range}"
        return None

    @property
    def _least(self) -> float:
        return -math.inf if self.min is None else self.min

    @property
    def _most(self) -> float:
        return math.inf if self.max is None else self.max

    @property
    def expects(self) -> str:
        """The type in a user's words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word or a string"}
        return words[self.kind]

    @property
    def range(self) -> str:
        """The bounds in a user's words."""
        if self.above is not None:
            return f"above {self.above:g}"
        if self.min is not None and self.max is not None:
            return f"between {self.min:g} and {self.max:g}"
        return f"at least {self.min:g}" if self.min is not None else f"at most {self.max:g}"


def _described(given: Any) -> str:
    if isinstance(given, bool):
        return str(given).lower()
    return f'"{given}"' if isinstance(given, str) else f"{given}"


@dataclass(frozen=True, slots=True)
class _Field:
    default: Any
    options: dict[str, Any]


def param(
    default: Any,
    doc: str,
    *,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
    alias: str | None = None,
) -> Any:
    """Declares a method's parameter as a class attribute; the annotation gives its type."""
    bounds = {"min": min, "max": max, "above": above}
    return _Field(default, {"doc": doc, "choices": choices, "alias": alias, **bounds})


class Method:
    """Base of every method. A subclass gives `state`, one of the rewrites, and `delta` or `fold` if it merges."""

    name: ClassVar[str]
    formula: ClassVar[str]
    paper: ClassVar[str]
    site: ClassVar[type[Site] | UnionType] = Linear  # or several kinds: Linear | Experts
    stage: ClassVar[Stage] = Stage.WEIGHT
    identity: ClassVar[bool] = True
    unmergeable: ClassVar[str | None] = None
    peft_type: ClassVar[str | None] = None
    parameters: ClassVar[dict[str, Param]] = {}

    def __init__(self, **given: Any) -> None:
        """Raises TypeError or ValueError on what the plan would have reported with a line and a caret."""
        for name, value in given.items():
            if name not in self.parameters:
                raise TypeError(f"{self.name} has no parameter {name!r}")
            if problem := self.parameters[name].problem(value):
                raise ValueError(f"{name} {problem}")
        for name, parameter in self.parameters.items():
            value = given.get(name, parameter.default)
            setattr(self, name, float(value) if parameter.kind is float and value is not None else value)

    @classmethod
    def kinds(cls) -> tuple[type[Site], ...]:
        """The kinds of site it attaches to, its own kind first."""
        return get_args(cls.site) or (cast(type[Site], cls.site),)

    @property
    def values(self) -> dict[str, Any]:
        """The parameters as they are set."""
        return {name: getattr(self, name) for name in self.parameters}

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value}' for name, value in self.values.items())})"

    def conflict(self) -> str | None:
        """Why these parameters do not go together, or None."""
        return None

    def refuses(self, site: Any) -> str | None:
        """Why this method cannot attach to `site`, a site of its kind, or None."""
        return None

    def claims_weight(self) -> str | None:
        """Why nothing else may change the weight that this method stands on, or None."""
        return None

    def state(self, site: Any) -> dict[str, State]:
        """The tensors the method keeps at `site`: shapes and initialisation, no data."""
        raise NotImplementedError

    def initialise(self, site: Any, weight: Tensor, state: dict[str, Tensor]) -> None:
        """Fills state from the frozen weight [n_out, n_in], where the method starts from it."""

    def prepare(self, site: Any, weight: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The frozen weight as the compiled model keeps it; another tensor where the method takes a part out."""
        return weight

    def rewrite_input(self, *given: Any) -> Tensor:
        """(site, x, *state): x as everything at the site shall read it. State is asked for by name."""
        raise NotImplementedError

    def rewrite(self, *given: Any) -> Tensor:
        """(site, x, y, *state): the site's output. State, `weight` and `bias` are asked for by name."""
        raise NotImplementedError

    def delta(self, site: Any, **state: Tensor) -> Tensor:
        """The definition as a change of the weight, [n_out, n_in]."""
        raise NotImplementedError

    def fold(
        self, site: Any, weight: Tensor, bias: Tensor | None, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The weight [n_out, n_in] and bias [n_out] of a plain layer that does the same."""
        return weight + self.delta(site, **state).to(weight.dtype), bias

    def to_peft(self, site: Any, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """HF PEFT's settings and tensors for one module; only where `peft_type` says it has the method."""
        raise NotImplementedError

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], module: str, tensors: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Parameters and state from HF PEFT's settings and one module's tensors; None if they are another method's."""
        return None

    def adds_bias(self, site: Any) -> bool:
        """Whether `fold` needs a bias to put something in, which a layer may not have."""
        return False

    def rate(self, state: str) -> float:
        """The learning rate of one state tensor, as a multiple of the base rate."""
        return 1.0

    def rewrites_input(self, site: Any) -> bool:
        """Whether the method acts on what goes into the site; else on what comes out."""
        return False


M = TypeVar("M", bound=type[Method])
_registry: dict[str, type[Method]] = {}


def method(cls: M) -> M:
    """Registers a method under its `name` and turns its fields into parameters."""
    cls.parameters = {
        name: _parameter(name, hint, field)
        for name, hint in get_type_hints(cls).items()
        if isinstance(field := cls.__dict__.get(name), _Field)
    }
    if cls.name in _registry:
        raise ValueError(f"two methods are called {cls.name}")
    _registry[cls.name] = cls
    return cls


def _parameter(name: str, hint: Any, field: _Field) -> Param:
    optional = isinstance(hint, UnionType)
    kind = next(part for part in get_args(hint) if part is not type(None)) if optional else hint
    return Param(name, cast(type, kind), field.default, optional=optional, **field.options)


@cache
def methods() -> dict[str, type[Method]]:
    """Every method by name: importing each file under `passes/methods` registers what it defines."""
    package = importlib.import_module("peftc.passes.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_registry.items()))


@cache
def wanted(function: Callable[..., Any], given: int) -> tuple[str, ...]:
    """The names a rewrite asks for behind its first `given` parameters."""
    return tuple(inspect.signature(function).parameters)[given:]
