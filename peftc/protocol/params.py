"""Declared parameters: class attributes that become the language's arguments, the help, and what diagnostics say.

Methods, the parameterisations of their matrices and storages are all `Configured`: a name, parameters, and a registry
that is one folder under `passes`.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Any, ClassVar, TypeVar, cast, get_args, get_type_hints

from peftc.protocol import torch

REQUIRED: Any = object()
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # that float32 holds, with all its digits


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter, as the language, the help and the diagnostics see it."""

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

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is REQUIRED

    @property
    def nested(self) -> type[Configured] | None:
        """What kind of call this parameter takes, as in `gated(lora(r=8))`; None for a plain value."""
        return self.kind if issubclass(self.kind, Configured) else None

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
        if isinstance(given, int | float) and given and not SMALLEST <= abs(given) <= LARGEST:
            return f"must be a number that float32 holds, between {SMALLEST:.1e} and {LARGEST:.1e}"
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
        if self.nested:
            return f"a {self.nested.noun}, such as {self.nested.such_as}"
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word or a string"}
        return words[self.kind]

    @property
    def range(self) -> str:
        """The bounds in a user's words."""
        if self.above is not None:
            return f"above {self.above:g}" + (f", at most {self.max:g}" if self.max is not None else "")
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
    """Declares a parameter as a class attribute; the annotation gives its type.

    An annotation that is `Configured` takes a call; its default is then a name of that kind's registry.
    """
    bounds = {"min": min, "max": max, "above": above}
    return _Field(default, {"doc": doc, "choices": choices, "alias": alias, **bounds})


class Configured:
    """Something a spec can call by name with parameters. Each kind of it has a registry: a folder under `passes`.

    A class gives its `name`, a `formula` in one line, the `paper` where there is one, and a docstring, whose words
    `peftc methods` prints. Its tensors lie under `name` in the model: it is none that a module has already.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    paper: ClassVar[str] = ""
    parameters: ClassVar[dict[str, Param]] = {}
    noun: ClassVar[str]
    such_as: ClassVar[str]
    folder: ClassVar[str]

    def __init__(self, **given: Any) -> None:
        """Raises TypeError or ValueError on what the plan would have reported with a line and a caret."""
        for name, value in given.items():
            if name not in self.parameters:
                raise TypeError(f"{self.name} has no parameter {name!r}")
            if problem := self.parameters[name].problem(value):
                raise ValueError(f"{name} {problem}")
        for name, parameter in self.parameters.items():
            value = given.get(name, parameter.default)
            if value is REQUIRED:
                raise TypeError(f"{self.name} needs {name}")
            if parameter.nested and isinstance(value, str):
                value = registered(parameter.nested)[value]()
            setattr(self, name, float(value) if parameter.kind is float and value is not None else value)

    @property
    def values(self) -> dict[str, Any]:
        """The parameters as they are set."""
        return {name: getattr(self, name) for name in self.parameters}

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value}' for name, value in self.values.items())})"

    def changed(self, name: str) -> bool:
        """Whether a parameter is other than by default."""
        return bool(getattr(self, name) != self.parameters[name].default)

    def conflict(self) -> str | None:
        """Why these parameters do not go together, or None."""
        return None

    @classmethod
    def check(cls) -> None:
        """Called before a model is planned. Raises TypeError where the class is not what its base asks for."""


C = TypeVar("C", bound=type[Configured])
_registries: dict[str, dict[str, type[Configured]]] = {}
_sound: set[type[Configured]] = set()


def register(cls: C) -> C:
    """Registers a class under its `name` and turns its fields into parameters, those of its bases included.

    `check_registered` says what else is wrong with it.

    Raises:
        TypeError: where the class lacks what it is told by, or a parameter cannot be one.
        ValueError: where its name is taken, or can be none.
    """
    demand(cls, Configured, name="the word that a spec calls it by", formula="what it computes, in one line")
    if __debug__ and not cls.__doc__:
        raise TypeError(f"{cls.__name__} has no docstring: its words are what `peftc methods {cls.name}` prints")
    if not cls.name.isidentifier():
        raise ValueError(f"{cls.__name__} is called {cls.name!r}, which is no word that a spec can call")
    if cls.name in ("weight", "bias"):
        raise ValueError(f"{cls.__name__} is called {cls.name}: a layer has its {cls.name} there")
    hints = get_type_hints(cls)
    fields: dict[str, Any] = {}
    for base in cls.__mro__:  # its own come first
        fields = fields | {name: field for name, field in vars(base).items() if name not in fields}
    cls.parameters = {
        name: _parameter(cls, name, hints.get(name), field)
        for name, field in fields.items()
        if isinstance(field, _Field)
    }
    known = _registries.setdefault(cls.folder, {})
    elsewhere = cls.name in files_in(cls.folder) and cls.__module__ != f"peftc.passes.{cls.folder}.{cls.name}"
    if cls.name in known or elsewhere:
        raise ValueError(f"two {cls.folder} are called {cls.name}")
    known[cls.name] = cls
    return cls


def demand(cls: type, base: type, **parts: str) -> None:
    """Raises TypeError where `cls` has no more than its base class of one of `parts`, each with what it is."""
    nothing = object()
    for name, what in parts.items():
        if inspect.getattr_static(cls, name, nothing) is inspect.getattr_static(base, name, nothing):
            raise TypeError(f"{cls.__name__} has no {name}: {what}")


def taken_in_modules(name: str) -> str | None:
    """Why no tensor, and no module with tensors, can lie under `name` in a model, or None."""
    return f"every torch module has {name!r} already" if hasattr(torch.nn.Module(), name) else None


def _parameter(cls: type[Configured], name: str, hint: Any, field: _Field) -> Param:
    """Raises TypeError where the annotation, the name or the default is none that a parameter can have."""
    where = f"{cls.__name__}.{name}"
    own = name in vars(Configured) or name in Configured.__annotations__
    if own or any(callable(vars(base).get(name)) for base in cls.__mro__[1:]):
        raise TypeError(f"{where} is a parameter, and {name!r} means something else of a {cls.noun}: rename it")
    optional = isinstance(hint, UnionType)
    kinds = [part for part in get_args(hint) if part is not type(None)] if optional else [hint]
    kind = kinds[0]
    known = kind in (int, float, bool, str) or (isinstance(kind, type) and issubclass(kind, Configured))
    if len(kinds) > 1 or not known:
        raise TypeError(f"{where} needs an annotation: int, float, bool or str, with `| None` where it may be left out")
    made = Param(name, cast(type, kind), field.default, optional=optional, **field.options)
    if not (made.required or made.nested) and (problem := made.problem(made.default)):
        raise TypeError(f"the default of {where} {problem}")
    return made


class Registry(Mapping[str, type[Configured]]):
    """What the files of one folder define, by name: a file is called as what it defines, and imported when that is
    asked for. What has registered from elsewhere is among it.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.known = _registries.setdefault(folder, {})

    @property
    def names(self) -> list[str]:
        """All of them, those that are not imported yet among them."""
        return sorted({*files_in(self.folder), *self.known})

    def __getitem__(self, name: str) -> type[Configured]:
        if name not in self.known and name in files_in(self.folder):
            importlib.import_module(f"peftc.passes.{self.folder}.{name}")
            if name not in self.known:
                file = f"passes/{self.folder}/{name}.py"
                raise TypeError(f"{file} defines no {name}: a file is called as what it defines")
        return self.known[name]

    def __contains__(self, name: object) -> bool:
        return name in self.known or name in files_in(self.folder)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def registered(kind: type[Configured]) -> Mapping[str, type[Configured]]:
    """Everything of one kind by name."""
    return registry(kind.folder)


@cache
def registry(folder: str) -> Registry:
    """Everything that one folder's files define."""
    return Registry(folder)


def check_registered() -> None:
    """Holds everything that is registered, each once, against what it is made for: reading a spec does without.

    Raises:
        TypeError: where a class is not what its base asks for.
        ValueError: where a module has its name already.
    """
    for kind in Configured.__subclasses__():
        for cls in registered(kind).values():
            if cls not in _sound:
                check(cls)
                _sound.add(cls)


def check(cls: type[Configured]) -> None:
    """The same for one class."""
    if reason := taken_in_modules(cls.name):
        raise ValueError(f"{cls.__name__} is called {cls.name}: {reason}")
    cls.check()


@cache
def files_in(folder: str) -> list[str]:
    """The names of the files of a folder under `passes`."""
    return [module.name for module in pkgutil.iter_modules(importlib.import_module(f"peftc.passes.{folder}").__path__)]


def import_all(folder: str) -> None:
    """Imports each file of a folder under `passes`: what it defines registers itself."""
    for name in files_in(folder):
        importlib.import_module(f"peftc.passes.{folder}.{name}")


def divisors_near(size: int, wanted: int, *, of: int = 1) -> str:
    """Up to four divisors of `size`, multiples of `of` alone, those nearest to `wanted` by ratio, as words."""
    divisors = [n for n in range(of, size + 1, of) if size % n == 0]
    nearest = sorted(sorted(divisors, key=lambda n: abs(math.log(n / wanted)))[:4])
    return " and ".join(filter(None, (", ".join(map(str, nearest[:-1])), str(nearest[-1]))))
