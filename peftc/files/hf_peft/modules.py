"""HF PEFT's folders for methods that adapt modules one by one: each tensor lies under the name of its module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Set
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from peftc.diagnostics.diagnostic import PeftcError
from peftc.files.errors import BadArtifact, CannotExport
from peftc.files.hf_peft import biases, groups
from peftc.files.hf_peft.kinds import about
from peftc.files.hf_peft.names import FEEDFORWARD, Names, key_for, pattern_of, saying
from peftc.files.hf_peft.places import experts as expertfolders
from peftc.files.hf_peft.places.experts import WRAPPED
from peftc.files.hf_peft.places.layers import unfit
from peftc.files.hf_peft.saved import tells_kind
from peftc.files.hf_peft.spec import OF_THE_WEIGHT, applied, of_kind, trained
from peftc.graph.ir import get_attribute
from peftc.language import Statement
from peftc.planning.plan import Binding, Plan
from peftc.protocol.method import Method, methods
from peftc.protocol.site import Experts, Linear, Projection
from peftc.runtime.module import Runtime

PREFIX = "base_model.model."
ROOT = "base_model."  # of what all modules share
START = "init_lora_weights"
PROJECTIONS = "save_projection"  # whether that is in the folder; else it is drawn again


def modules_folder(
    compiled: Runtime, saved: dict[str, Any], held: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors of a model whose one method adapts modules; `saved` and `held` are of those left whole.

    Raises:
        PeftcError: `cannot-export` where HF PEFT would take them for something else.
    """
    bindings = compiled.plan.bindings
    config: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    said: dict[str, dict[str, Any]] = {}
    stacks = sorted(binding.site.name for binding in bindings if isinstance(binding.site, Experts))
    order = _in_order(compiled.base, {binding.site.name for binding in bindings})
    by_bias = biases.meaning(compiled.base, compiled.plan)
    for binding in bindings:
        state = {name: get_attribute(compiled, full).detach() for name, full in binding.names.items()}
        settings, own = binding.method.to_peft(binding.site, state)
        if by_bias:
            settings |= {biases.SETTING: by_bias}
        said[binding.site.name] = settings
        _join(config, settings, binding)
        place = binding.site.name
        if isinstance(binding.site, Experts):
            place, own = expertfolders.place(compiled.base, place, stacks), expertfolders.stored(own)
        if binding.method.peft_apart:
            own = {name: tensor.clone() for name, tensor in own.items()}  # of what is shared each module has a copy
        tensors |= {f"{PREFIX}{place}.{name}": tensor for name, tensor in own.items()}
        for theirs in binding.method.peft_numbered:
            number = order.index(binding.site.name)
            tensors[f"{ROOT}{theirs}.{number}"] = tensors.pop(f"{PREFIX}{place}.{theirs}")
        for theirs, ours in binding.method.peft_shared.items():
            if not torch.equal(tensors.setdefault(ROOT + theirs, state[ours]), state[ours]):
                raise PeftcError(CannotExport(reason=f"{theirs} is the same for all modules there", span=binding.span))
    if by_bias:
        wrapped = {f"{binding.site.name}{biases.END}" for binding in bindings}
        for full in compiled.plan.trained:
            there = f"{full.removesuffix(biases.END)}.{WRAPPED}{biases.END}" if full in wrapped else full
            tensors[PREFIX + there] = get_attribute(compiled, full).detach()
    config |= {"target_modules": _targets(compiled.base, bindings, set(stacks))}
    config |= saved | about(compiled, told=tells_kind(compiled))
    if inner := config.get(FEEDFORWARD):
        written, targets = saying(compiled.base, inner, by_letters=True), config["target_modules"]
        apart = isinstance(written, list) and isinstance(targets, list) and not {*written} <= {*targets}
        config[FEEDFORWARD] = pattern_of(inner) if apart else written  # of two lists one must have the other's words
    if stacks:
        config["target_parameters"] = stacks
    if any(isinstance(binding.site, Linear) and binding.site.transposed for binding in bindings):
        config["fan_in_fan_out"] = True  # not all of HF PEFT's methods know the word
    try:
        _check_names(compiled, config, said)
    except TimeoutError:
        reason = "matching its names against the modules takes too long"
        raise PeftcError(CannotExport(reason=reason, span=bindings[0].span)) from None
    return config, tensors | held


def _targets(base: nn.Module, bindings: tuple[Binding, ...], stacks: set[str]) -> str | list[str]:
    if not bindings[0].method.peft_apart:
        return saying(base, {binding.site.name for binding in bindings} - stacks)
    statements: dict[int, list[str]] = defaultdict(list)
    for binding in bindings:
        statements[binding.statement].append(binding.site.name)
    found = groups.entries(base, bindings)
    if found is None or any(names != _in_order(base, names) for names in statements.values()):
        reason = "modules share by the ends of their names there, and by these they would share otherwise than here"
        raise PeftcError(CannotExport(reason=reason, span=bindings[0].span))
    return found


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


class ModulesReader:
    """Reads a method that adapts modules one by one, as HF PEFT would put it onto `model`.

    HF PEFT passes by the tensors that it has no place for, and starts anew what it has no tensors for. A folder of
    which that is so is none that was meant: it is refused, with the name that does not fit.
    """

    def __init__(
        self, model: nn.Module, bad: Callable[..., BadArtifact], config: dict[str, Any], saved: Set[str]
    ) -> None:
        """`saved`: the base model's parameters that the folder holds whole, and that are read already."""
        self._model, self._bad, self._config, self._saved = model, bad, config, saved
        self._kind = config["peft_type"]
        self._names = Names(model, config)
        self._common: dict[str, Tensor] = {}
        self._learned: dict[str, Tensor] = {}  # of the base's own
        self._own: dict[str, dict[str, Tensor]] = {}  # by module or parameter, under their names
        self._states: dict[str, dict[str, Tensor]] = {}  # and under ours

    def read(self, tensors: dict[str, Tensor]) -> tuple[list[Statement], Callable[[Plan], dict[str, Tensor]]]:
        """The statements, and what makes the state.

        Raises:
            PeftcError: `bad-artifact` where something does not fit the rest.
        """
        self._group(tensors)
        places: dict[tuple[str, tuple[tuple[str, Any], ...], str], list[str]] = defaultdict(list)
        for place, own in self._own.items():
            method, settings, self._states[place] = self._recognised(place, own)
            apart = groups.entry(self._config, place) if methods()[method].peft_apart else ""
            places[method, tuple(settings.items()), apart].append(place)
        statements: list[Statement] = [
            applied(name, dict(given), chosen) for (name, given, _), chosen in places.items()
        ]
        return [*statements, *map(trained, self._learned)], self._state

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
        numbered = {
            f"{ROOT}{theirs}.{number}": f"{PREFIX}{place}.{theirs}"
            for cls in of_kind(self._kind) for theirs in cls.peft_numbered
            for number, place in enumerate(_in_order(self._model, places))
        }  # fmt: skip
        word = next(iter(of_kind(self._kind))).peft_bias
        learning = biases.learning(self._config, places.values(), self._base, word) - self._saved
        for stored, tensor in tensors.items():
            key = numbered.get(stored, stored)
            place, name = _split(key, places)
            if key in shared:
                if saved:
                    self._common[shared[key]] = tensor
            elif self._is_the_base_s(key, tensor, learning):
                continue
            elif place and ROOT + name in shared and torch.equal(tensor, tensors[ROOT + name]):
                continue  # a copy of what all modules share
            elif place:
                grouped[place][name] = tensor
            else:
                raise self._refusal(f"its {key} belongs to nothing that its target_modules choose")
        if absent := sorted(learning - self._learned.keys()):
            raise self._refusal(f"it has no {absent[0]}, which its {biases.SETTING} says learns")
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

    def _is_the_base_s(self, key: str, tensor: Tensor, learning: Set[str]) -> bool:
        """Whether it is a parameter of the base model: one that learned, or one as it is there, such as a head."""
        inner = key.removeprefix(PREFIX)
        name = inner if inner in self._base else inner.replace(f".{WRAPPED}.", ".")
        base = self._base.get(name)
        if base is None or inner == key:
            return False
        if name in learning and base.shape == tensor.shape:
            self._learned[name] = tensor
            return True
        if not torch.equal(base.detach().cpu(), tensor.to(base.dtype)):
            rows = f", of {len(tensor)} rows: model.resize_token_embeddings({len(tensor)}) makes room"
            larger = rows if tensor.shape[1:] == base.shape[1:] and tensor.shape != base.shape else ""
            raise self._refusal(f"its {key} is another than the base model's{larger}")
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
            started = settings.get(START) if settings.get(START) in OF_THE_WEIGHT else None
            found = cls.from_peft(settings, place, own)
            if found is not None and (started is None or found[0].get("init") == started):
                return cls.name, *found
        if not own:
            raise self._refusal(f"it has no tensors for {place}, which its target_modules choose")
        counts = {name for cls in of_kind(self._kind) for name in cls.obeyed() - {*cls.peft_patterns.values()}}
        loud = {name: given for name, given in settings.items() if given is True or isinstance(given, dict)}
        said = [f"{name}={given}" for name, given in loud.items() if name in counts]
        said += [f"{START}={started}"] if started else []
        kind = f"{self._kind} with {', '.join(said)}" if said else self._kind
        if place not in self._base and isinstance(self._model.get_submodule(place), nn.MultiheadAttention):
            raise self._refusal(f"at {place}, a MultiheadAttention, HF PEFT adds what out_proj learned twice")
        raise self._refusal(f"what it holds at {place} ({', '.join(sorted(own))}) is no {kind} that peftc has")

    def _state(self, plan: Plan) -> dict[str, Tensor]:
        found = {binding.site.name: binding for binding in plan.bindings}
        if absent := sorted(self._states.keys() - found.keys()):
            raise self._refusal(f"its target_modules choose {absent[0]}, which is no layer that peftc can adapt")
        for place, binding in found.items():
            if isinstance(binding.site, Experts) and (misread := expertfolders.misread(self._model, binding.site)):
                raise self._refusal(f"where HF PEFT made it, {misread}")
            odd, site = None, binding.site
            if isinstance(site, Projection) and not site.features_last:
                odd = unfit(self._model, site) or binding.method.unexportable(site)
            if odd:
                raise self._refusal(f"where HF PEFT made it, {odd}")
            self._start(place, binding)
            self._check(place, binding)
        own: dict[str, Tensor] = {}
        for place, binding in found.items():
            for name, tensor in self._states[place].items():
                if not torch.equal(own.setdefault(binding.names[name], tensor), tensor):
                    raise self._refusal(f"its {name} at {place} is another than at modules that have it in common")
        return own | self._shared(plan, own.keys()) | self._learned

    def _start(self, place: str, binding: Binding) -> None:
        """Frozen state that the folder leaves out: the settings, and the base's weight, alone decide what it is."""
        site, state = binding.site, self._states[place]
        missing = {name for name, spec in binding.state.items() if name not in state and not spec.trainable}
        if missing and isinstance(site, Linear):
            weight = self._base[site.owner].detach()
            started = {
                name: spec.init(torch.empty(spec.shape, dtype=spec.dtype or torch.float32))
                for name, spec in binding.state.items()
            }
            binding.method.initialise(site, weight.t() if site.transposed else weight, started)
            state |= {name: started[name] for name in missing}

    def _check(self, place: str, binding: Binding) -> None:
        """Refuses tensors whose shapes are not those that follow from the settings."""
        state, own = self._states[place], self._own[place]
        specs = binding.state | {name: spec for name, spec in binding.shared.items() if name in state}
        wanted = {name: spec.shape for name, spec in specs.items()}
        given = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name in sorted({name for name, _ in wanted.items() ^ given.items()}):
            theirs = next((key for key, tensor in own.items() if tensor is state.get(name)), ", ".join(sorted(own)))
            sizes = [f"{key}={value}" for key, value in binding.method.values.items() if isinstance(value, int)
                     and not isinstance(value, bool) and value in wanted.get(name, ())]  # fmt: skip
            says = f"the settings ({', '.join(sizes)}) say" if sizes else "the model and the settings say"
            reason = f"its {theirs} at {place} is {given.get(name)}, where {says} {wanted.get(name, 'nothing of it')}"
            raise self._refusal(reason)

    def _shared(self, plan: Plan, known_already: Set[str]) -> dict[str, Tensor]:
        """What modules share beside `known_already`: from the folder, else as it starts, which settings decide."""
        found: dict[str, Tensor] = {}
        order = [binding.site.name for binding in plan.bindings]
        for binding in plan.bindings:
            for name, spec in binding.shared.items():
                if binding.names[name] in known_already | found.keys():
                    continue
                if type(binding.method).shares is not Method.shares and order != _in_order(self._model, order):
                    raise self._refusal(f"it leaves out {name}, drawn in another order of modules than the model has")
                theirs = next((theirs for theirs, ours in binding.method.peft_shared.items() if ours == name), "")
                known = self._common.get(theirs)
                if known is None:
                    known = spec.init(torch.empty(spec.shape, dtype=spec.dtype))
                elif known.shape != spec.shape:
                    reason = f"its {theirs} is {tuple(known.shape)}, where the settings say {spec.shape}"
                    raise self._refusal(reason)
                found.setdefault(binding.names[name], known)
        return found


def _in_order(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """Modules as the model has them, one after the other."""
    wanted = {*modules}
    return [name for name, _ in model.named_modules() if name in wanted]


def _split(key: str, places: dict[str, str]) -> tuple[str, str]:
    """The place that a tensor's key is of, '' for none, and the tensor's name there."""
    inner = key.removeprefix(PREFIX)
    parts = inner.split(".") if inner != key else []
    for end in range(len(parts) - 1, 0, -1):
        if (place := ".".join(parts[:end])) in places:
            return place, ".".join(parts[end:])
    return "", inner
