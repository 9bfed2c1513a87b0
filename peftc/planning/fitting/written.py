"""What was chosen, as selectors that a spec could have: short where there is a short one that means just that."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from peftc.language import Glob
from peftc.protocol.site import Block

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|\Z)")


def blocks(chosen: Sequence[Block], every: Sequence[Block]) -> str:
    """A selector of blocks: all, a slice of the layers, or their names."""
    if len(chosen) == len(every):
        return "block"
    layers = sorted({block.layer for block in chosen if block.layer is not None})
    if layers:
        first, end = layers[0], layers[-1] + 1
        if [block for block in every if block.layer is not None and first <= block.layer < end] == list(chosen):
            return f"block in layers[{first or ''}:{end}]"
    return names([block.name for block in chosen], [block.name for block in every])


def names(chosen: Iterable[str], every: Iterable[str]) -> str:
    """Patterns that mean these names among `every`: `*` where all numbers are there, else the numbers."""
    numbers: dict[str, list[str]] = defaultdict(list)
    for name in chosen:
        number = _NUMBER.search(name)
        numbers[_NUMBER.sub("{}", name, count=1)].append(number[0] if number else "")
    known = list(every)
    return ", ".join(f'"{_pattern(form, found, known)}"' for form, found in numbers.items())


def _pattern(form: str, numbers: list[str], known: list[str]) -> str:
    if "{}" not in form:
        return form
    general = Glob(form.replace("{}", "*"), span=None).regex()  # type: ignore[arg-type]
    if sum(general.fullmatch(name) is not None for name in known) == len(numbers):
        return form.replace("{}", "*")
    return form.replace("{}", numbers[0] if len(numbers) == 1 else f"{{{','.join(numbers)}}}")
