"""The code that a model runs: which it is, and whether it is what the files of its libraries say.

What a forward calls is looked for where it looks itself: in the classes of the model's modules and of what these hold,
in what stands beside these classes in their files, and in the files that those functions are from. A function that
somebody put there is of other code, and another one of the library is told as what it is.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import time
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils.generic import GeneralInterface

from peftc.capture.recorded.errors import NotRecordedError

LIBRARIES = ("torch", "transformers")
# Beside the libraries what these are built on, or read images, sound and text with where it is installed; none of it is
# asked what a layer computes.
KNOWN = {
    *LIBRARIES, *sys.stdlib_module_names, "accelerate", "huggingface_hub", "numpy", "packaging", "safetensors",
    "scipy", "tqdm", "typing_extensions", "PIL", "cv2", "filelock", "httpx", "jinja2", "librosa", "pandas", "regex",
    "requests", "sentencepiece", "sklearn", "soundfile", "tokenizers", "torchaudio", "torchvision", "yaml",
} - {"unittest"}  # fmt: skip
EVERYWHERE = ("torch", "torch.nn.functional", "torch.nn.modules.module", "torch.utils.checkpoint")
PLAIN = (bool, int, float, str, type(None))
READ = time.time()
HERE = Path(__file__).parents[2]


def code_of(classes: Iterable[type]) -> list[Any]:
    """What tells the code of objects of these classes.

    Raises:
        NotRecordedError: where there is code of nobody's files.
    """
    own = dict.fromkeys(base for one in classes for base in one.__mro__)
    for one in own:
        if not is_known(one.__module__):
            raise NotRecordedError(f"{one.__qualname__} is of {one.__module__}")
    waiting = [*dict.fromkeys((*(one.__module__ for one in own), *EVERYWHERE))]
    files = {*waiting}
    named: dict[type, None] = {torch.Tensor: None}
    told: list[Any] = []
    while waiting:
        name = waiting.pop()
        file = sys.modules.get(name)
        if file is None or not _is_followed(name):
            continue
        of_model = name.startswith("transformers.models.")
        told.append((name, _digest(file), [*_members(name, vars(file), plain=of_model)]))
        held = [one for value in vars(file).values() for one in _held(value)]
        if of_model:
            named |= dict.fromkeys(one for one in held if isinstance(one, type) and _is_followed(one.__module__))
        found = {owner for one in held if not isinstance(one, type) for owner in _owners(one)} - files
        waiting += found
        files |= found
    told += [
        (f"{one.__module__}.{one.__qualname__}", [*_members(one.__qualname__, vars(one), plain=one in own)])
        for one in own | named
    ]
    return [_own_files(), *sorted(told, key=str)]


def is_known(module: str | None) -> bool:
    """Whether a module is of the libraries, or of what these are built on."""
    return module is None or module.partition(".")[0] in KNOWN or module.startswith("namedtuple_")


def name_of(thing: Any) -> str:
    """What tells a function, a class or something else that can be called.

    Raises:
        NotRecordedError: where it is of other code.
    """
    for owner in _owners(thing):
        if not is_known(owner):
            raise NotRecordedError(f"{thing!r} is of other code")
    inner = _inner(thing)
    if inner is not None:
        return f"{type(thing).__qualname__} {' '.join(map(name_of, inner))}"
    line = thing.__code__.co_firstlineno if isinstance(thing, types.FunctionType) else 0
    return f"{getattr(thing, '__module__', None)}.{getattr(thing, '__qualname__', type(thing).__qualname__)} {line}"


def _is_followed(name: str) -> bool:
    return name in EVERYWHERE or name.startswith(("transformers.", "torch.nn."))


def _members(owner: str, held: Mapping[str, Any], *, plain: bool) -> Iterator[Any]:
    """What a class or a file has, by name; where it is `plain`, also numbers and words."""
    for name, value in [*held.items()]:
        if name.startswith("__") and not callable(value):
            continue
        things = [*_held(value)]
        try:
            told = [name_of(one) for one in things]
        except NotRecordedError as error:
            raise NotRecordedError(f"{owner} has {name}: {error}") from error
        if plain and not things:
            told.append(_plain(value))
        if told:
            yield name, told


def _held(value: Any) -> Iterator[Any]:
    """What can be called of a thing that somebody has; also what registries have under a name."""
    if type(value) is dict or isinstance(value, GeneralInterface):
        yield from (one for one in [*value.values()] if _is_code(one))
    elif _is_code(value):
        yield value


def _is_code(value: Any) -> bool:
    return callable(value) or isinstance(value, property | classmethod | functools.cached_property)


def _plain(value: Any) -> str:
    if type(value) in PLAIN:
        return repr(value)
    if type(value) in (list, tuple):
        return f"{[_plain(one) if type(one) in PLAIN else type(one).__qualname__ for one in value]}"
    if type(value) is dict:
        return f"{[(str(name), _plain(one) if type(one) in PLAIN else '') for name, one in value.items()]}"
    return type(value).__qualname__


def _inner(thing: Any) -> list[Any] | None:
    """What a thing is a way of calling, None where it is no such thing."""
    if isinstance(thing, functools.partial):
        return [thing.func, *(one for one in (*thing.args, *thing.keywords.values()) if callable(one))]
    if isinstance(thing, property):
        return [one for one in (thing.fget, thing.fset) if one is not None]
    if isinstance(thing, functools.cached_property):
        return [thing.func]
    if isinstance(thing, staticmethod | classmethod | types.MethodType):
        return [thing.__func__]
    return [thing.__wrapped__] if isinstance(thing, functools._lru_cache_wrapper) else None


def _owners(thing: Any) -> set[str]:
    """The modules that a thing is of; a function may say that it is of another than the one that it lies in."""
    if (inner := _inner(thing)) is not None:
        return {owner for one in inner for owner in _owners(one)}
    owners = {getattr(thing, "__module__", None)}
    if not isinstance(thing, type):
        owners.add(type(thing).__module__)
    if isinstance(thing, types.FunctionType):
        owners.add(thing.__globals__.get("__name__"))
    return {owner for owner in owners if isinstance(owner, str)}


def _digest(module: types.ModuleType) -> str:
    file = getattr(module, "__file__", None)
    return _digest_of(Path(file)) if file is not None and file.endswith(".py") else ""


def _digest_of(file: Path) -> str:
    if file.stat().st_mtime > READ:
        raise NotRecordedError(f"{file.name} was written after this process had begun, which may have read it before")
    return hashlib.sha256(file.read_bytes()).hexdigest()


@functools.cache
def _own_files() -> str:
    return hashlib.sha256("".join(map(_digest_of, sorted(HERE.rglob("*.py")))).encode()).hexdigest()
