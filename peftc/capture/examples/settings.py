"""What a configuration says, wherever in it that stands: a model of several parts has one configuration in another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PretrainedConfig

SPECIAL = re.compile(r"token_(id|index)$|_token$")


def parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A configuration and those in it, the outer ones first."""
    waiting = [config]
    for part in waiting:
        yield part
        waiting += [value for value in vars(part).values() if isinstance(value, PretrainedConfig)]


def held_by(model: nn.Module) -> list[PretrainedConfig]:
    """All of a model's configurations, also those that its modules alone have: T5's decoder goes by a copy."""
    own = [getattr(module, "config", None) for module in model.modules()]
    every = [part for config in own if isinstance(config, PretrainedConfig) for part in parts(config)]
    return list({id(part): part for part in every}.values())


def found(config: PretrainedConfig, *names: str) -> list[Any]:
    """The values by these names, each once, as they are found: the first name first, outer parts before inner ones."""
    values = [value for name in names for part in parts(config) if (value := getattr(part, name, None)) is not None]
    return list({repr(value): value for value in values}.values())


def numbers(config: PretrainedConfig, *names: str) -> list[int]:
    """Those of the values that are whole numbers above 0."""
    return [value for value in found(config, *names) if type(value) is int and value > 0]


def sides(config: PretrainedConfig, *names: str) -> list[tuple[int, int]]:
    """Heights and widths: a number stands for both."""
    both = [(value, value) if type(value) is int else value for value in found(config, *names)]
    pairs = [tuple(value.values()) if isinstance(value, dict) else tuple(value) for value in both if _has_two(value)]
    return list(dict.fromkeys((height, width) for height, width in pairs if type(height) is type(width) is int))


def _has_two(value: Any) -> bool:
    return isinstance(value, list | tuple | dict) and len(value) == 2


def plain_token(config: PretrainedConfig) -> int:
    """A token that means nothing in particular, the first behind 0."""
    special = {
        value
        for part in parts(config)
        for name, value in vars(part).items()
        if SPECIAL.search(name) and type(value) is int
    }
    return next(token for token in range(1, len(special) + 2) if token not in special)
