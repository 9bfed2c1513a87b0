"""HF PEFT's rules of names: which modules an entry of `adapter_config.json` chooses, and how to say which are meant.

Entries of a list are ends of names (`fc` chooses `block.fc`, too), a string is a regular expression for the whole name,
and a pattern's key one for the end of it, unless it starts with `^`.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from typing import Any

import regex
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftc.language.matching import Clock

ALL_LINEAR = "all-linear"
HEADS = ("score", "classifier")  # the first of them is left out of all linear layers of a classifier of sequences
FEEDFORWARD = "feedforward_modules"
SECONDS = 3.0  # that making a folder's patterns, of which there may be one for each module, and matching them may take


class Names:
    """What a folder's settings mean by names, on one model.

    Every method raises TimeoutError where patterns take too long in all, ValueError or regex.error where one is none.
    """

    def __init__(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        self._model, self._config, self._clock = model, config, Clock(SECONDS)
        self._patterns: dict[str, regex.Pattern[str]] = {}

    def modules(self) -> set[str]:
        """The modules that `target_modules` chooses, less those that other settings leave out or save whole."""
        targets, names = self._config.get("target_modules"), [name for name, _ in self._model.named_modules() if name]
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            targets = self._all_linear()
        chosen, left_out = _chosen_by(targets), _chosen_by(self._config.get("exclude_modules"))
        found = {name for name in names if self._chooses(chosen, name) and not self._fits(left_out, name)}
        return {name for name in found if not self._is_saved(name)}

    def parameters(self) -> list[str]:
        """The parameters that `target_parameters` chooses, in the model's order."""
        targets = frozenset(map(str, self._config.get("target_parameters") or []))
        return [name for name, _ in self._model.named_parameters() if ends_with(name, targets)]

    def settings(self, name: str, patterns: Mapping[str, str]) -> dict[str, Any]:
        """The settings of one module or parameter: of a pattern the first key that fits counts."""
        own = dict(self._config)
        for setting, pattern in patterns.items():
            for key, value in (self._config.get(pattern) or {}).items():
                if self._clock.timed(self._compiled(rf"(.*\.)?({key})$").match, name):
                    own[setting] = value
                    break
        if FEEDFORWARD in own:  # by letters, where targets go by whole names
            inner = own[FEEDFORWARD]
            if inner is None:
                raise ValueError(f"its {FEEDFORWARD} do not say which modules are meant")
            by_pattern = isinstance(inner, str)
            own[FEEDFORWARD] = self._fits(inner, name) if by_pattern else name.endswith(tuple(inner))
        return own

    def _compiled(self, pattern: str) -> regex.Pattern[str]:
        if pattern not in self._patterns:
            self._patterns[pattern] = self._clock.compiled(pattern)
        return self._patterns[pattern]

    def _is_saved(self, name: str) -> bool:
        """Whether `name` is one of `modules_to_save`, or lies in a module by one of these names: patterns here."""
        saved = self._config.get("modules_to_save") or ()
        return any(
            self._clock.timed(self._compiled(rf"(^|.*\.){module}($|\..*)").match, name) is not None for module in saved
        )

    def _chooses(self, targets: str | Set[str], name: str) -> bool:
        if isinstance(targets, str) or name in targets:
            return self._fits(targets, name)
        return ends_with(name, targets) and self._in_layers(name)

    def _in_layers(self, name: str) -> bool:
        layers = self._config.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        containers = self._config.get("layers_pattern") or []
        containers = [containers] if isinstance(containers, str) else containers
        for start in [rf"(?:^|.*?\.){container}" for container in containers] or [r".*?\.[^.]*"]:
            if found := self._clock.timed(self._compiled(rf"{start}\.(?P<idx>\d+)\.").match, name):
                return int(found["idx"]) in ([layers] if isinstance(layers, int) else layers)
        return False

    def _fits(self, targets: str | Set[str], name: str) -> bool:
        if isinstance(targets, str):
            return bool(self._clock.timed(self._compiled(targets).fullmatch, name))
        return ends_with(name, targets)

    def _all_linear(self) -> list[str]:
        """Every linear layer but the output's."""
        model, head = self._model, None
        if isinstance(model, PreTrainedModel):
            head = model.get_output_embeddings()
            if head is None and self._config.get("task_type") == "SEQ_CLS":
                head = next((getattr(model, name) for name in HEADS if hasattr(model, name)), None)
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        return [name for name, module in layers if module is not head]


def ends_with(name: str, targets: Set[str]) -> bool:
    """Whether `name` is one of `targets`, or lies in a module by one of these names."""
    parts = name.split(".")
    return any(".".join(parts[start:]) in targets for start in range(len(parts)))


def _chosen_by(targets: Any) -> str | Set[str]:
    return targets if isinstance(targets, str) else frozenset(map(str, targets or []))


def saying(model: nn.Module, modules: Iterable[str], *, by_letters: bool = False) -> str | list[str]:
    """What chooses just these modules: the shortest ends of their names that no others have, or an anchored pattern.

    `by_letters`: as IA3's `feedforward_modules` are matched, which end a name anywhere.
    """
    wanted = {*modules}
    names = [name for name, _ in model.named_modules()]
    for length in itertools.count(1):
        ends = {".".join(name.split(".")[-length:]) for name in wanted}
        chosen = {name for name in names if (name.endswith(tuple(ends)) if by_letters else ends_with(name, ends))}
        numbered = any(part.isdigit() for end in ends for part in end.split("."))
        if chosen == wanted and not numbered:
            return sorted(ends)
        if ends == wanted or numbered:
            return pattern_of(wanted)
    raise AssertionError


def grouped(names: Iterable[str]) -> list[tuple[str, list[str], list[str]]]:
    """Names as few products: what stands before a first number, the numbers, and what stands behind each of them.

    A name without a number is by itself, with neither.
    """
    numbers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        parts = name.split(".")
        place = next((at for at, part in enumerate(parts) if part.isdigit()), None)
        if place is None:
            numbers[name, ""] = []
        else:
            numbers[".".join(parts[:place]), ".".join(parts[place + 1 :])].append(parts[place])
    behind: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for (before, after), found in numbers.items():
        behind[before, tuple(sorted(set(found), key=int))].append(after)
    return [(before, [*found], sorted(afters)) for (before, found), afters in behind.items()]


def pattern_of(names: Iterable[str]) -> str:
    """A pattern that means these names and no other."""
    found = []
    for before, numbers, afters in grouped(sorted(names)):
        parts = [*filter(None, [re.escape(before)]), *filter(None, map(_one_of, (numbers, afters)))]
        found.append(r"\.".join(parts))
    return f"^{found[0]}$" if len(found) == 1 else f"^(?:{'|'.join(found)})$"


def _one_of(choices: list[str]) -> str:
    """A pattern for one of some texts; none where there is none, or only an empty one."""
    spelt = [re.escape(choice) for choice in choices]
    return spelt[0] if len(spelt) == 1 else f"({'|'.join(spelt)})" if spelt else ""


def key_for(module: str) -> str:
    """A pattern's key that means this module alone."""
    return f"^{re.escape(module)}"
