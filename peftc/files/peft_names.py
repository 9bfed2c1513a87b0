"""HF PEFT's rules of names: which modules an entry of `adapter_config.json` chooses, and how to say which are meant.

Entries of a list are ends of names (`fc` chooses `block.fc`, too), a string is a regular expression for the whole name,
and a pattern's key one for the end of it, unless it starts with `^`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import regex
from torch import nn

from peftc.language.matching import Clock


def _chosen(names: Iterable[str], targets: list[str], by_letters: bool) -> set[str]:
    """Which of `names` a list in `target_modules` chooses, or (`by_letters`) one in IA3's `feedforward_modules`."""
    if by_letters:
        return {name for name in names if name.endswith(tuple(targets))}
    return {name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)}


def saying(model: nn.Module, modules: Iterable[str], *, by_letters: bool = False) -> str | list[str]:
    """What chooses just these modules: their names, or a pattern, where the names are the ends of others', too."""
    wanted = sorted({*modules})
    names = [name for name, _ in model.named_modules()]
    if _chosen(names, wanted, by_letters) == {*wanted}:
        return wanted
    return "|".join(map(re.escape, wanted))


def key_for(module: str) -> str:
    """A pattern's key that means this module alone."""
    return f"^{re.escape(module)}"


def settings_of(module: str, config: dict[str, Any], patterns: dict[str, str], clock: Clock) -> dict[str, Any]:
    """The settings of one module: of a pattern the first key that fits counts. `clock` is the whole folder's.

    Raises:
        TimeoutError: where a key takes too long to match.
        regex.error: where one is no regular expression.
    """
    own = dict(config)
    for name, pattern in patterns.items():
        for key, value in (config.get(pattern) or {}).items():
            if clock.found(regex.compile(rf"^(.*\.)?({key})$"), module):
                own[name] = value
                break
    return own
