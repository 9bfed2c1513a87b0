"""Modules of the base model that HF PEFT's folders hold whole: `modules_to_save`, and what comes with a task.

An entry of `modules_to_save` means each module whose name ends in its letters. Of a classifier the head is there
whether it is named or not, and whether it learns or not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftc.diagnostics.diagnostic import PeftcError
from peftc.files.errors import BadArtifact, CannotExport
from peftc.files.hf_peft.biases import meaning
from peftc.files.hf_peft.kinds import HEADS, kind_of
from peftc.files.hf_peft.spec import trained
from peftc.graph.ir import get_attribute
from peftc.language import Statement
from peftc.planning.plan import Plan
from peftc.runtime.module import Runtime

SAVED = "modules_to_save"
TYING = "ensure_weight_tying"
PREFIX = "base_model.model."


def saved_whole(model: nn.Module, entries: Iterable[str]) -> list[str]:
    """The modules that entries of `modules_to_save` mean, those inside of others left out."""
    ends, found = tuple(entries), list[str]()
    for name, _ in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f"{module}.") for module in found)
        if name and ends and not inside and f"{PREFIX}{name}".endswith(ends):
            found.append(name)
    return found


# Written


def saved_modules(compiled: Runtime) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors for what learns of the base model beside an adapter, and for a classifier's head.

    Raises:
        PeftcError: `cannot-export`, once a statement, where a module learns in part only.
    """
    plan, base = compiled.plan, compiled.base
    learning = {alias: name for name in plan.trained for alias in plan.captured.aliases.get(name, [name])}
    apart = meaning(base, plan) is not None  # biases, which another setting says
    modules = {} if apart else {alias.rpartition(".")[0]: plan.trained[name] for alias, name in learning.items()}
    problems: dict[Any, CannotExport] = {}
    for module, span in modules.items():
        parameters = base.get_submodule(module).named_parameters(prefix=module, remove_duplicate=False)
        still = next((name for name, _ in parameters if name not in learning), None)
        if still or not module:
            reason = (
                "of the base model's parameters it holds whole modules, all biases, or those of the adapted modules, "
                f"and {still} does not learn"
            )
            problems.setdefault(span, CannotExport(reason=reason, span=span))
    if problems:
        raise PeftcError(*problems.values())
    heads = saved_whole(base, HEADS.get(_told_kind(compiled), ()))
    outermost = [name for name in {**modules, **dict.fromkeys(heads)} if not _inside(name, {*modules, *heads})]
    names = _entries(base, outermost)
    if names is None:
        raise PeftcError(CannotExport(reason=f"no names mean {outermost[0]} alone", span=next(iter(modules.values()))))
    tensors = {
        PREFIX + name: get_attribute(compiled, learning[name]) if name in learning else plan.captured.frozen(name)
        for module in outermost
        for name, _ in base.get_submodule(module).named_parameters(prefix=module, remove_duplicate=False)
    }
    tied = any(len(plan.captured.aliases.get(name, ())) > 1 for name in plan.trained)
    return {SAVED: names or None, **({TYING: True} if tied else {})}, {
        key: tensor.detach().clone() if tied else tensor.detach() for key, tensor in tensors.items()
    }


def _told_kind(compiled: Runtime) -> str | None:
    return kind_of(compiled.base) if tells_kind(compiled) else None


def tells_kind(compiled: Runtime) -> bool:
    """Whether the folder may say what the model is for: not where its head is adapted, which HF PEFT then saves."""
    heads = saved_whole(compiled.base, HEADS.get(kind_of(compiled.base), ()))
    return not any(_inside(binding.site.name, {*heads, ""} - {""}, own=True) for binding in compiled.plan.bindings)


def _inside(name: str, modules: set[str], *, own: bool = False) -> bool:
    """Whether a name lies in one of the modules, or, with `own`, is one."""
    return (own and name in modules) or any(name.startswith(f"{module}.") for module in modules if module)


def _entries(model: nn.Module, modules: list[str]) -> list[str] | None:
    """The shortest ends of names that mean just these modules; None where there are none."""
    wanted = sorted(modules)
    for length in range(1, max((name.count(".") for name in wanted), default=0) + 3):
        ends = sorted({".".join(f"{PREFIX}{name}".split(".")[-length:]) for name in wanted})
        if sorted(saved_whole(model, ends)) == wanted:
            return ends
    return None if wanted else []


# Read


@dataclass(frozen=True)
class Saved:
    """What a folder holds of the base model's own parameters, by their names, and the rest of its tensors."""

    learned: dict[str, Tensor] = field(default_factory=dict)
    tied: set[str] = field(default_factory=set)  # those of them that are one tensor with another
    rest: dict[str, Tensor] = field(default_factory=dict)

    @property
    def statements(self) -> list[Statement]:
        """`train` for each of them: a tensor that several modules have has one name, so these are named themselves."""
        return [trained(name.rpartition(".")[0] if name in self.tied else name) for name in self.learned]

    def state(self, plan: Plan) -> dict[str, Tensor]:
        """What learns, by the plan's names: one for what is tied."""
        aliases = plan.captured.aliases
        found = {name: [alias for alias in aliases.get(name, [name]) if alias in self.learned] for name in plan.trained}
        return {name: self.learned[own[0]] for name, own in found.items() if own}


def entries_of(config: Mapping[str, Any]) -> list[str]:
    """What `modules_to_save` says, with what HF PEFT adds for a task.

    Raises:
        ValueError: where it is no list of names.
    """
    given = config.get(SAVED) or []
    if not isinstance(given, list) or not all(isinstance(entry, str) and entry for entry in given):
        raise ValueError(f"{SAVED}={given}")
    return list(dict.fromkeys([*given, *HEADS.get(config.get("task_type"), ())]))


def read_saved(
    model: nn.Module, bad: Callable[..., BadArtifact], config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Saved:
    """Takes the modules that are saved whole out of a folder's tensors, and embeddings that were made longer.

    Raises:
        PeftcError: `bad-artifact` where one of them is not there, or is none of the model's.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    modules = saved_whole(model, config.get(SAVED) or ())
    wanted = [name for name in parameters if _inside(name, {*modules})]
    for name in wanted:
        if PREFIX + name not in tensors:
            raise PeftcError(bad(reason=f"it has no {PREFIX}{name}, which its {SAVED} say it has"))
    wanted += [name for name in _embeddings(model) if _differs(tensors.get(PREFIX + name), parameters[name])]
    learned = {name: tensors[PREFIX + name] for name in parameters if name in wanted}
    for name, tensor in learned.items():
        own = tuple(parameters[name].shape)
        if tensor.shape != own:
            longer = "" if tensor.dim() != 2 or tensor.shape[1:] != own[1:] or name not in _embeddings(model) else (
                f": resize_token_embeddings({len(tensor)}) makes it fit"
            )  # fmt: skip
            raise PeftcError(bad(reason=f"its {PREFIX}{name} is {tuple(tensor.shape)}, the model's is {own}{longer}"))
    tied = _tied(bad, config, parameters, learned)
    still = {PREFIX + name: tensor for name, tensor in buffers.items() if _inside(name, {*modules})}
    if odd := [key for key, tensor in still.items() if key in tensors and _differs(tensors[key], tensor)]:
        raise PeftcError(bad(reason=f"its {odd[0]} is another than the base model's, and no parameter that learns"))
    taken = {*still, *(PREFIX + name for name in learned)}
    return Saved(learned, tied, {key: tensor for key, tensor in tensors.items() if key not in taken})


def _tied(
    bad: Callable[..., BadArtifact],
    config: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    learned: dict[str, Tensor],
) -> set[str]:
    """Of those that learn the ones that are one tensor here. HF PEFT saves, and trains, each by itself."""
    found = set()
    for name in [*learned]:
        for other in (known for known, tensor in parameters.items() if tensor is parameters[name] and known != name):
            if other not in learned and config.get(TYING):
                learned[other] = learned[name]
            if other in learned and torch.equal(learned[other], learned[name]):
                found |= {name, other}
                continue
            hint = "pass a model whose config says tie_word_embeddings=False"
            raise PeftcError(bad(reason=f"its {name} is another than {other}, and the model's are one tensor: {hint}"))
    return found


def _embeddings(model: nn.Module) -> list[str]:
    """The weights that HF PEFT saves, too, where tokens were added."""
    if not isinstance(model, PreTrainedModel):
        return []
    places = []
    for module in (_asked(model.get_input_embeddings), _asked(model.get_output_embeddings)):
        places += [f"{n}.weight" for n, known in model.named_modules() if known is module and hasattr(module, "weight")]
    return places


def tokens_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
    """How many tokens a folder's embeddings have, where these are others than the model's; None where they are not."""
    own = dict(model.named_parameters(remove_duplicate=False))
    for name in _embeddings(model):
        saved = tensors.get(PREFIX + name)
        if saved is not None and saved.dim() == 2 and len(saved) != len(own[name]):
            return len(saved)
    return None


def _asked(ask: Callable[[], Any]) -> nn.Module | None:
    try:
        found: nn.Module | None = ask()
    except (NotImplementedError, AttributeError):  # a model without any says so
        return None
    return found


def _differs(tensor: Tensor | None, own: Tensor) -> bool:
    if tensor is None:
        return False
    return tensor.shape != own.shape or own.is_meta or not torch.equal(own.detach().cpu(), tensor.to(own.dtype))


# Old names


def without_adapter_name(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of today: some hold the adapter's, `default`, and the wrapper of a module that is saved.

    Of a model whose own names have these words they are left as they are.
    """
    own = {part for name, _ in model.named_modules() for part in name.split(".")}
    words = [word for word in ("default", SAVED) if word not in own]
    if not words:
        return {**tensors}
    pattern = re.compile(rf"\.(?:{'|'.join(words)})(?=\.|$)")
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if ".original_module." in key:
            continue
        there = found.setdefault(pattern.sub("", key), tensor)
        if there is not tensor and not torch.equal(there, tensor):
            return {**tensors}  # two names would be one
    return found
