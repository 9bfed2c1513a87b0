"""HF PEFT's folders for methods that adapt modules one by one: each tensor lies under the name of its module."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from peftc.diagnostics.diagnostic import PeftcError
from peftc.files.errors import BadArtifact, CannotExport
from peftc.files.hf_peft import experts as expertfolders
from peftc.files.hf_peft.names import FEEDFORWARD, Names, key_for, saying
from peftc.files.hf_peft.spec import applied, of_kind
from peftc.graph.ir import get_attribute, module_path
from peftc.language import Statement
from peftc.planning.plan import Binding, Plan
from peftc.protocol.site import Experts, Linear, Projection
from peftc.runtime.module import Runtime

PREFIX = "base_model.model."
ROOT = "base_model."  # of what all modules share
PROJECTIONS = "save_projection"  # whether that is in the folder; else it is drawn again


def modules_folder(compiled: Runtime) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors of a model whose one method adapts modules.

    Raises:
        PeftcError: `cannot-export` where HF PEFT would take them for something else.
    """
    bindings = compiled.plan.bindings
    config: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    said: dict[str, dict[str, Any]] = {}
    stacks = sorted(binding.site.name for binding in bindings if isinstance(binding.site, Experts))
    for binding in bindings:
        state = {name: get_attribute(compiled, full).detach() for name, full in binding.names.items()}
        settings, own = binding.method.to_peft(binding.site, state)
        said[binding.site.name] = settings
        _join(config, settings, binding)
        place = binding.site.name
        if isinstance(binding.site, Experts):
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
    try:
        _check_names(compiled, config, said)
    except TimeoutError:
        reason = "matching its names against the modules takes too long"
        raise PeftcError(CannotExport(reason=reason, span=bindings[0].span)) from None
    return config, tensors


def _join(config: dict[str, Any], settings: dict[str, Any], binding: Binding) -> None:
    """One config for all modules: the first one's settings, with what differs in the patterns HF PEFT has."""
    patterns = binding.method.peft_patterns
    for name, value in settings.items():
        if isinstance(value, list):
            config.setdefault(name, []).extend(value)
        elif isinstance(value, dict):
            config.setdefault(name, {}).update(value)
        elif config.setdefault(name, value) != value:
            if name not in patterns:
                raise PeftcError(CannotExport(reason=f"{name} is the same for all modules there", span=binding.span))
            config.setdefault(patterns[name], {})[key_for(binding.site.name)] = value


def _check_names(compiled: Runtime, config: dict[str, Any], said: dict[str, dict[str, Any]]) -> None:
    """Refuses a config by which HF PEFT's rules choose other modules, or give one of them other settings."""
    names = Names(compiled.base, config)
    first = compiled.plan.bindings[0]
    if odd := sorted({*names.modules(), *names.parameters()} ^ said.keys()):
        reason = f"its names mean {odd[0]}, too" if odd[0] not in said else f"no name means {odd[0]} there"
        raise PeftcError(CannotExport(reason=reason, span=first.span))
    for binding in compiled.plan.bindings:
        there = names.settings(binding.site.name, binding.method.peft_patterns)
        for name, value in said[binding.site.name].items():
            wanted = bool(value) if name == FEEDFORWARD else value
            if not isinstance(value, dict) and there[name] != wanted:
                reason = f"{name} would be {there[name]} at {binding.site.name}"
                raise PeftcError(CannotExport(reason=reason, span=binding.span))


def unfit(base: nn.Module, site: Projection) -> str | None:
    """Why HF PEFT, which wraps a layer or a module's parameter where it is called, cannot adapt `site`; or None."""
    if isinstance(site, Experts):
        if "." not in site.name:
            return f"it adapts no parameter of the model itself, as {site.name} is"
        return expertfolders.misread(base, site)
    if site.within:
        return f"it adapts modules where they are called, and what calls {site.name} runs its own code"
    if any(module_path(use.op) != site.path for use in site.uses):
        return f"it adapts modules where they are called, and another part of the model reads the weight of {site.name}"
    module = base.get_submodule(site.path)
    if site.name != site.path or not isinstance(module, nn.Linear | Conv1D):
        return f"it adapts nn.Linear and Conv1D, and {site.name} is a {type(module).__name__}"
    return None if _is_plain(module) else f"it adapts whole modules, and {site.name} does more than a linear layer"


def _is_plain(module: nn.Linear | Conv1D) -> bool:
    """Whether a linear layer computes x Wᵀ + b and nothing else, as seen from outside, hooks and all."""
    forward = type(module).forward
    if forward in (nn.Linear.forward, Conv1D.forward) and not module._forward_hooks and not module._forward_pre_hooks:
        return True
    try:
        return _computes_a_line(_with_numbers(module))
    except Exception:  # whatever its own code wants of its input, it is more than that
        return False


def _computes_a_line(module: nn.Linear | Conv1D) -> bool:
    weight = module.weight.detach().t() if isinstance(module, Conv1D) else module.weight.detach()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[1], generator=generator).to(weight)
    with torch.no_grad():
        return torch.allclose(module(x), linear(x, weight, module.bias), rtol=1e-4, atol=1e-5)


def _with_numbers(module: nn.Linear | Conv1D) -> nn.Linear | Conv1D:
    """The module, or, where its weight was left in the checkpoint, one that is like it, of other numbers."""
    if not module.weight.is_meta:
        return module
    twin = copy.deepcopy(module).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return twin


class ModulesReader:
    """Reads a method that adapts modules one by one, as HF PEFT would put it onto `model`.

    HF PEFT passes by the tensors that it has no place for, and starts anew what it has no tensors for. A folder of
    which that is so is none that was meant: it is refused, with the name that does not fit.
    """

    def __init__(self, model: nn.Module, bad: Callable[..., BadArtifact], config: dict[str, Any]) -> None:
        self._model, self._bad, self._config = model, bad, config
        self._kind = config["peft_type"]
        self._names = Names(model, config)
        self._common: dict[str, Tensor] = {}
        self._own: dict[str, dict[str, Tensor]] = {}  # by module or parameter, under their names
        self._states: dict[str, dict[str, Tensor]] = {}  # and under ours

    def read(self, tensors: dict[str, Tensor]) -> tuple[list[Statement], Callable[[Plan], dict[str, Tensor]]]:
        """The statements, and what makes the state.

        Raises:
            PeftcError: `bad-artifact` where something does not fit the rest.
        """
        self._group(tensors)
        places: dict[tuple[str, tuple[tuple[str, Any], ...]], list[str]] = defaultdict(list)
        for place, own in self._own.items():
            method, settings, self._states[place] = self._recognised(place, own)
            places[method, tuple(settings.items())].append(place)
        return [applied(name, dict(given), chosen) for (name, given), chosen in places.items()], self._state

    def _refusal(self, reason: str) -> PeftcError:
        return PeftcError(self._bad(reason=reason))

    def _group(self, tensors: dict[str, Tensor]) -> None:
        """Gives each tensor to the module that the settings choose for it."""
        saved = self._config.get(PROJECTIONS, True)
        shared = {ROOT + theirs: theirs for cls in of_kind(self._kind) for theirs in cls.peft_shared}
        if saved and (missing := sorted(shared.keys() - tensors.keys())):
            raise self._refusal(f"it has no {missing[0]}, which its {PROJECTIONS} says it has")
        places = self._places()
        grouped: dict[str, dict[str, Tensor]] = {place: {} for place in places}
        for key, tensor in tensors.items():
            place, name = _split(key, places)
            if key in shared:
                if saved:
                    self._common[shared[key]] = tensor
            elif self._is_the_base_s(key, tensor):
                continue
            elif place:
                grouped[place][name] = tensor
            else:
                raise self._refusal(f"its {key} belongs to nothing that its target_modules choose")
        if absent := sorted(place for place, own in grouped.items() if not own):
            raise self._refusal(f"it has no tensors for {absent[0]}, which its target_modules choose")
        for place, own in grouped.items():
            experts = self._experts(places[place])
            self._own[places[place]] = expertfolders.restored(own, experts) if experts else own

    def _places(self) -> dict[str, str]:
        """Where tensors lie in the folder -> which module or parameter they are for: all that the settings choose."""
        if self._config.get("target_modules") is None and not self._config.get("target_parameters"):
            raise self._refusal("its target_modules do not say which modules are meant")
        adapted = self._names.parameters()
        modules = {name: name for name in sorted(self._names.modules())}
        return modules | {expertfolders.place(self._model, name, adapted): name for name in adapted}

    def _is_the_base_s(self, key: str, tensor: Tensor) -> bool:
        """Whether it is a parameter of the base model, as it is there, such as a bias or an output's own weight."""
        inner = key.removeprefix(PREFIX)
        base = self._base.get(inner, self._base.get(inner.replace(f".{expertfolders.WRAPPED}.", ".")))
        if base is None or inner == key:
            return False
        if not torch.equal(base.detach().cpu(), tensor.to(base.dtype)):
            raise self._refusal(f"its {key} is another than the base model's")
        return True

    @cached_property
    def _base(self) -> dict[str, Tensor]:
        return dict(self._model.named_parameters(remove_duplicate=False))

    def _experts(self, place: str) -> int:
        """How many matrices a parameter is a stack of; 0 for a module."""
        if place not in self._base:
            return 0
        if self._base[place].dim() != 3:
            raise self._refusal(f"its target_parameters choose {place}, which is no stack of experts")
        return len(self._base[place])

    def _recognised(self, place: str, own: dict[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
        """Method, parameters and state at one place."""
        settings: dict[str, Any] = {}
        for cls in of_kind(self._kind):
            settings = self._names.settings(place, cls.peft_patterns)
            if found := cls.from_peft(settings, place, own):
                return cls.name, *found
        said = [f"{name}={given}" for name, given in settings.items() if name in cls.peft_settings and given is True]
        kind = f"{self._kind} with {', '.join(said)}" if said else self._kind
        raise self._refusal(f"what it holds at {place} ({', '.join(sorted(own))}) is no {kind} that peftc has")

    def _state(self, plan: Plan) -> dict[str, Tensor]:
        found = {binding.site.name: binding for binding in plan.bindings}
        if absent := sorted(self._states.keys() - found.keys()):
            raise self._refusal(f"its target_modules choose {absent[0]}, which is no layer that peftc can adapt")
        for place, binding in found.items():
            if isinstance(binding.site, Experts) and (misread := expertfolders.misread(self._model, binding.site)):
                raise self._refusal(f"where HF PEFT made it, {misread}")
            self._check(place, binding)
        own = {f"{b.path}.{name}": tensor for b in plan.bindings for name, tensor in self._states[b.site.name].items()}
        return own | self._shared(plan)

    def _check(self, place: str, binding: Binding) -> None:
        """Refuses tensors whose shapes are not those that follow from the settings."""
        state, own = self._states[place], self._own[place]
        wanted = {name: spec.shape for name, spec in binding.state.items()}
        given = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name in sorted({name for name, _ in wanted.items() ^ given.items()}):
            theirs = next((key for key, tensor in own.items() if tensor is state.get(name)), ", ".join(sorted(own)))
            sizes = [f"{key}={value}" for key, value in binding.method.values.items() if isinstance(value, int)
                     and not isinstance(value, bool) and value in wanted.get(name, ())]  # fmt: skip
            says = f"the settings ({', '.join(sizes)}) say" if sizes else "the model and the settings say"
            reason = f"its {theirs} at {place} is {given.get(name)}, where {says} {wanted.get(name, 'nothing of it')}"
            raise self._refusal(reason)

    def _shared(self, plan: Plan) -> dict[str, Tensor]:
        """What all modules share: from the folder, else as it starts, which the settings alone decide."""
        found: dict[str, Tensor] = {}
        for binding in plan.bindings:
            for name, spec in binding.shared.items():
                theirs = next((theirs for theirs, ours in binding.method.peft_shared.items() if ours == name), "")
                known = self._common.get(theirs)
                if known is None:
                    known = spec.init(torch.empty(spec.shape, dtype=spec.dtype))
                elif known.shape != spec.shape:
                    reason = f"its {theirs} is {tuple(known.shape)}, where the settings say {spec.shape}"
                    raise self._refusal(reason)
                found.setdefault(binding.names[name], known)
        return found


def _split(key: str, places: dict[str, str]) -> tuple[str, str]:
    """The place that a tensor's key is of, '' for none, and the tensor's name there."""
    inner = key.removeprefix(PREFIX)
    parts = inner.split(".") if inner != key else []
    for end in range(len(parts) - 1, 0, -1):
        if (place := ".".join(parts[:end])) in places:
            return place, ".".join(parts[end:])
    return "", inner
