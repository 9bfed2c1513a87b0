"""HF PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`, written and read.

A folder of HF PEFT holds one method on whole modules. What does not fit that is refused, not approximated.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
import safetensors.torch
import torch
from torch import Tensor, nn

from peftc.capture.ondisk import read_tensors
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.reading import read_file
from peftc.files import peft_experts as expertfolders
from peftc.files.errors import BadArtifact, CannotExport
from peftc.files.folder import current, steadily, write_folder
from peftc.files.peft_names import key_for, saying, settings_of
from peftc.files.peft_prefix import KIND, TENSOR, has_prefix, prefix_folder, read_prefix
from peftc.files.peft_prompt import has_prompt, prompt_folder, read_prompt
from peftc.files.peft_spec import applied, spec_of
from peftc.graph.ir import get_attribute, module_path
from peftc.language import Spec, Statement
from peftc.language.matching import Clock
from peftc.planning.plan import Binding, Plan
from peftc.protocol.method import methods
from peftc.protocol.site import Experts, Linear, Projection
from peftc.runtime.module import Runtime

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
LARGEST_CONFIG = 4 << 20  # bytes
PREFIX = "base_model.model."
ROOT = "base_model."  # of what all modules share
# LoRA's starts that leave the base model's weights alone, and options that make another method of it.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
OTHERS = ("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config",
          "use_bdlora", "use_qalora", "velora_config")  # fmt: skip
MARKS = (".lora_", ".ia3_", ".hada_", ".lokr_", ".vera_")
PROMPTS = ("PROMPT_TUNING", "P_TUNING")
FEEDFORWARD = "feedforward_modules"
PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern", "alpha": "alpha_pattern"}


def save_pretrained(compiled: Runtime, folder: Path) -> None:
    """Writes what `peft.PeftModel.from_pretrained(base, folder)` reads.

    Raises:
        PeftcError: `cannot-export`, once a statement, where HF PEFT has no such adapter; `not-in-spec`, `bad-artifact`
            and `cannot-write` as for `save`.
    """
    compiled.watch.refuse_unplanned(compiled)
    bindings = compiled.plan.bindings
    problems = _problems(compiled)
    if problems:
        raise PeftcError(*problems)
    if has_prompt(compiled):
        config, tensors = prompt_folder(compiled)
    elif has_prefix(compiled):
        config, tensors = prefix_folder(compiled)
    else:
        config, tensors = _modules(bindings, compiled)
    blob = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    files = {TENSORS: blob, CONFIG: json.dumps(config, indent=2).encode()}
    write_folder(folder, files)


def _modules(bindings: tuple[Binding, ...], compiled: Runtime) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors of a method that adapts modules one by one."""
    config: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    stacks = sorted(binding.site.name for binding in bindings if isinstance(binding.site, Experts))
    for binding in bindings:
        state = {name: get_attribute(compiled, full).detach() for name, full in binding.names.items()}
        settings, own = binding.method.to_peft(binding.site, state)
        _join(config, settings, binding.site.name)
        place = binding.site.name
        if isinstance(binding.site, Experts):
            if reason := expertfolders.misread(compiled.base, binding.site):
                raise PeftcError(CannotExport(reason=reason, span=binding.span))
            place, own = expertfolders.place(compiled.base, place, stacks), expertfolders.stored(own)
        tensors |= {f"{PREFIX}{place}.{name}": tensor for name, tensor in own.items()}
        for theirs, ours in binding.method.peft_shared.items():
            if not torch.equal(tensors.setdefault(ROOT + theirs, state[ours]), state[ours]):
                raise PeftcError(CannotExport(reason=f"{theirs} is the same for all modules there", span=binding.span))
    config |= {
        "base_model_name_or_path": getattr(compiled.config, "_name_or_path", None) or None,
        "target_modules": saying(compiled.base, {binding.site.name for binding in bindings} - set(stacks)),
        "inference_mode": True,
        "task_type": None,
    }
    if inner := config.get(FEEDFORWARD):
        config[FEEDFORWARD] = saying(compiled.base, inner, by_letters=True)
    if stacks:
        config["target_parameters"] = stacks
    if any(isinstance(binding.site, Linear) and binding.site.transposed for binding in bindings):
        config["fan_in_fan_out"] = True  # not all of HF PEFT's methods know the word
    return config, tensors


@dataclass(frozen=True)
class Adapter:
    """What a folder of HF PEFT means: a spec, and the compiled model's tensors once the spec is planned.

    `state` may raise a PeftcError `bad-artifact`.
    """

    spec: Spec
    state: Callable[[Plan], dict[str, Tensor]]


def read(model: nn.Module, folder: Path) -> Adapter:
    """The adapter that HF PEFT saved at `folder`, for a base model.

    Raises:
        PeftcError: `bad-artifact` if the folder is incomplete, or holds a method or an option peftc does not have.
    """
    config, tensors = steadily(folder, (CONFIG, TENSORS), lambda: _read(folder))
    if option := _another_meaning(config):
        raise PeftcError(BadArtifact(folder=str(folder), reason=f"its {option} is none that peftc has"))
    try:
        if config.get("peft_type") in PROMPTS and "prompt_embeddings" in tensors:
            statements, state = read_prompt(model, folder, config, tensors)
        elif config.get("peft_type") == KIND and TENSOR in tensors:
            statements, state = read_prefix(folder, config, tensors)
        else:
            statements, state = _read_modules(model, folder, config, tensors)
        return Adapter(spec_of(f"{folder.name}/{CONFIG}", statements), state)
    except (KeyError, TypeError, AttributeError, ValueError, regex.error) as error:
        reason = f"its settings are damaged ({type(error).__name__}: {error})"
        raise PeftcError(BadArtifact(folder=str(folder), reason=reason)) from None
    except TimeoutError:
        patterns = ", ".join(sorted({*PATTERNS.values()} & config.keys()))
        reason = f"matching its {patterns} takes too long"
        raise PeftcError(BadArtifact(folder=str(folder), reason=reason)) from None


def _another_meaning(config: dict[str, Any]) -> str | None:
    """An option of LoRA's folders by which tensors mean something else than alpha/r B A beside the base's weight."""
    if config.get("peft_type") != "LORA":
        return None
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool | str) or start not in PLAIN_STARTS:
        return f"init_lora_weights={start}"
    return next((f"{name}={config[name]}" for name in OTHERS if config.get(name)), None)


def _read_modules(
    model: nn.Module, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[list[Statement], Callable[[Plan], dict[str, Tensor]]]:
    """The statements, and what makes the state, of a method that adapts modules one by one."""
    common = {
        key.removeprefix(ROOT): tensors.pop(key) for key in list(tensors) if key.removeprefix(ROOT) in _shared_names()
    }
    grouped: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        mark = _separator(key)
        module, _, name = key.removeprefix(PREFIX).rpartition(mark)
        grouped[module][mark[1:] + name] = tensor
    statements, states = _recognised(model, folder, config, grouped)

    def state(plan: Plan) -> dict[str, Tensor]:
        for binding in plan.bindings:
            if isinstance(binding.site, Experts) and (misread := expertfolders.misread(model, binding.site)):
                raise PeftcError(BadArtifact(folder=str(folder), reason=f"where HF PEFT made it, {misread}"))
        own = {f"{b.path}.{name}": tensor for b in plan.bindings for name, tensor in states[b.site.name].items()}
        return own | _shared(plan, common)

    return statements, state


def _recognised(
    model: nn.Module, folder: Path, config: dict[str, Any], grouped: dict[str, dict[str, Tensor]]
) -> tuple[list[Statement], dict[str, dict[str, Tensor]]]:
    """A statement for each method call, and the state at each module."""
    grouped = expertfolders.restored(model, config, grouped)
    places: dict[tuple[str, tuple[tuple[str, Any], ...]], list[str]] = defaultdict(list)
    states: dict[str, dict[str, Tensor]] = {}
    clock = Clock()
    for module, own in grouped.items():
        for cls in methods().values():
            found = cls.from_peft(settings_of(module, config, PATTERNS, clock), module, own)
            if found is not None:
                places[cls.name, tuple(found[0].items())].append(module)
                states[module] = found[1]
                break
        else:
            reason = f"it holds {config.get('peft_type')} at {module}, in a form peftc does not have"
            raise PeftcError(BadArtifact(folder=str(folder), reason=reason))
    return [applied(name, dict(given), modules) for (name, given), modules in places.items()], states


def _shared_names() -> set[str]:
    return {theirs for cls in methods().values() for theirs in cls.peft_shared}


def _shared(plan: Plan, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What all modules share: from the folder, else as it starts, which the settings alone decide."""
    found: dict[str, Tensor] = {}
    for binding in plan.bindings:
        for name, spec in binding.shared.items():
            theirs = next((theirs for theirs, ours in binding.method.peft_shared.items() if ours == name), None)
            known = given[theirs] if theirs in given else spec.init(torch.empty(spec.shape, dtype=spec.dtype))
            found.setdefault(binding.names[name], known)
    return found


def _problems(compiled: Runtime) -> list[CannotExport]:
    found: dict[Any, CannotExport] = {}
    first = compiled.plan.bindings[0].method if compiled.plan.bindings else None
    for binding in compiled.plan.bindings:
        if (reason := _reason(binding, type(first))) and binding.statement not in found:
            found[binding.statement] = CannotExport(reason=reason, span=binding.span)
    for span in compiled.plan.trained.values():
        found.setdefault(span, CannotExport(reason="it holds no parameters of the base model", span=span))
    return list(found.values())


def _reason(binding: Binding, first: type[Any]) -> str | None:
    if binding.method.peft_type is None:
        return f"it has no {binding.method!r}"
    if reason := binding.method.unexportable(binding.site):
        return reason
    if type(binding.method) is not first:
        return f"one folder holds one method, and {first.name} comes first"
    site = binding.site
    if isinstance(site, Projection) and site.rows is not None:
        return f"it adapts whole modules, and {site.name} is a part of one"
    if isinstance(site, Linear) and any(module_path(use.op) != site.path for use in site.uses):
        return f"it adapts modules where they are called, and another part of the model reads the weight of {site.name}"
    return None


def _join(config: dict[str, Any], settings: dict[str, Any], module: str) -> None:
    """One config for all modules: the first one's settings, with what differs in the patterns HF PEFT has."""
    for name, value in settings.items():
        if isinstance(value, list):
            config.setdefault(name, []).extend(value)
        elif isinstance(value, dict):
            config.setdefault(name, {}).update(value)
        elif config.setdefault(name, value) != value:
            if name not in PATTERNS:
                raise PeftcError(CannotExport(reason=f"{name} is the same for all modules there"))
            config.setdefault(PATTERNS[name], {})[key_for(module)] = value


def _separator(key: str) -> str:
    """What stands between a module's name and a tensor's: every tensor's name starts with its method's."""
    return next((mark for mark in MARKS if mark in key), ".")


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads(read_file(current(folder, CONFIG), LARGEST_CONFIG))
        tensors = read_tensors(current(folder, TENSORS))
        if not isinstance(config.get("lora_alpha", 0), int | float):
            raise ValueError("lora_alpha is no number")
        return {"lora_alpha": 8, **config}, tensors
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise PeftcError(BadArtifact(folder=str(folder), reason=f"{type(error).__name__}: {error}")) from None
