"""HF PEFT's `bias`: of the base model, the biases of all modules or of the adapted ones learn beside an adapter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from peftc.planning.plan import Plan

SETTING = "bias"
ALL, NONE = "all", "none"
END = ".bias"


def meaning(base: nn.Module, plan: Plan) -> str | None:
    """What the setting is where just these parameters of the base learn beside a method's; None if there is no such."""
    word = plan.bindings[0].method.peft_bias
    if not plan.trained or word is None:
        return None
    adapted = {f"{binding.site.name}{END}" for binding in plan.bindings}
    every = {name for name, _ in base.named_parameters() if name.endswith(END)}
    return {frozenset(every & adapted): word, frozenset(every): ALL}.get(frozenset(plan.trained))


def learning(config: dict[str, Any], modules: Iterable[str], names: Iterable[str], word: str | None) -> set[str]:
    """Which of a model's parameters the setting makes learn, beside the adapters of `modules`.

    Raises:
        ValueError: where it is none that HF PEFT has.
    """
    said = config.get(SETTING)
    if said in (None, NONE):
        return set()
    biases = {name for name in names if name.endswith(END)}
    if said == ALL:
        return biases
    if said != word:
        raise ValueError(f"its {SETTING}={said} is none that it can have")
    return biases & {f"{module}{END}" for module in modules}
