"""The tensors that a plan promises, in the module: started, loaded, packed, and frozen weights as methods leave them.

State may start from a file that a spec names: safetensors alone, and only from the spec's own folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from peftc.capture.checkpoints.ondisk import read_tensors
from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.ir import get_attribute, set_tensor, tensors, value
from peftc.graph.surroundings import physical_memory
from peftc.planning.plan import Binding, Plan
from peftc.protocol.method import Here, State
from peftc.protocol.site import Projection
from peftc.rewrite.errors import BadStateFile, CannotStart, LeavesNoNumbers, NoMemory
from peftc.rewrite.packed import frozen_weight, is_packed, is_unread, leave_packed, pack, packed_now, put_packed
from peftc.rewrite.weights import dense_weight, replace_rows

HALF = (torch.float16, torch.bfloat16)
Bad = Callable[[str], PeftcError]
IN_FOLDER = "adapter.safetensors"


def materialise(
    module: fx.GraphModule,
    plan: Plan,
    state: Mapping[str, Tensor] | None = None,
    data: Mapping[Binding, Any] | None = None,
    *,
    unread: bool = False,
) -> None:
    """Gives `module` every tensor that `plan` promises: the methods' state and trained copies of parameters.

    `state` (full name -> tensor) is loaded instead of being initialised, where given. Random starts are drawn from
    torch's default generator, so `torch.manual_seed` decides them. `data` is what calibration saw. `unread`: the frozen
    weights are left in their checkpoint, and what starts from one reads it, and lets go of it.

    Raises:
        PeftcError: `no-memory` where all that is more than the machine can hold.
    """
    wanted = sum(prod(spec.shape) * (spec.dtype or torch.float16).itemsize for spec in plan.tensors.values())
    if wanted > (there := physical_memory()):
        raise PeftcError(NoMemory(wanted=wanted, there=there, span=plan.bindings[0].span))
    begin(module, plan, (), plan.trained, state)
    made: dict[str, Tensor] = {}
    with torch.no_grad():
        # A method that takes something out of a weight takes it out of the base's; the others start from what is kept.
        before = [b for b in plan.bindings if _prepares(b) and b.site.parameters[0] in plan.packed]
        for binding in before:
            _begin(module, plan, binding, made, state, data)
        for weight, item in plan.packed.items():
            if unread:
                leave_packed(module, item)
            elif not is_packed(module, item):
                _pack(module, plan, weight)
        for binding in plan.bindings:
            if binding not in before:
                _begin(module, plan, binding, made, state, data)
        _prepare(module, plan, [weight for weight in rewritten(plan) if weight not in plan.packed])


def begin(
    module: nn.Module,
    plan: Plan,
    bindings: Iterable[Binding],
    trained: Iterable[str],
    state: Mapping[str, Tensor] | None = None,
    data: Mapping[Binding, Any] | None = None,
) -> None:
    """Gives `module` the tensors of some of a plan's bindings, and trained copies of parameters, beside what it has."""
    made: dict[str, Tensor] = {}
    with torch.no_grad():
        for name in trained:
            given = state[name] if state else get_attribute(module, name)
            given = plan.captured.frozen(name) if is_unread(given) else given.detach().clone()
            set_tensor(module, name, torch.nn.Parameter(given))
        for binding in bindings:
            _begin(module, plan, binding, made, state, data)


def _pack(module: nn.Module, plan: Plan, weight: str) -> None:
    """Packs a weight with what methods change of it; one that none changes lies as its checkpoint has it, if packed."""
    base = _base(module, plan, weight)
    prepared = _prepared(module, plan, weight, base)
    item = plan.packed[weight]
    if prepared is base:
        put_packed(module, item, packed_now(plan, item, base))
    else:
        pack(module, item, prepared)


def _begin(
    module: nn.Module,
    plan: Plan,
    binding: Binding,
    made: dict[str, Tensor],
    state: Mapping[str, Tensor] | None,
    data: Mapping[Binding, Any] | None,
) -> None:
    """Fills the binding's tensors and puts them in place; `made`, by full name, are those of the bindings before."""
    method, site = binding.method, binding.site
    frozen = _beside(module, plan, binding)
    fresh = {full: spec for full, spec in binding.tensors.items() if full not in made}
    made |= {full: _start(spec, frozen) for full, spec in fresh.items()}
    own = {name: made[full] for name, full in binding.names.items()}
    if state:
        for full in fresh:
            made[full].copy_(state[full])
    else:
        weight = dense_weight(frozen, site) if isinstance(site, Projection) else frozen
        if reason := method.missing(site):
            raise PeftcError(CannotStart(method=method.name, reason=reason, span=binding.span))
        method.initialise(site, weight, own, _here(plan, binding))
        _load_start(binding, own)
        if data is not None and binding in data:
            method.calibrate(site, weight, data[binding], own)
    for full, spec in fresh.items():
        set_tensor(module, full, torch.nn.Parameter(made[full]) if spec.trainable else made[full])


def _beside(module: nn.Module, plan: Plan, binding: Binding) -> Tensor:
    """The frozen weight that state stands beside; where there is none, nothing like the value that changes."""
    site = binding.site
    if not site.parameters:
        devices = (tensor.device for tensor in tensors(module).values() if not tensor.is_meta)
        like = value(site.changes()[0])
        return torch.empty(0, dtype=like.dtype, device=next(devices, like.device))
    takes = site.parameters[0] in plan.packed and _prepares(binding)
    return (_base if takes else frozen_weight)(module, plan, site.parameters[0])


def prepare(module: nn.Module, plan: Plan) -> None:
    """Writes the frozen weights that methods take a part out of, or add one to, into copies of the base's tensors.

    From the base's own tensors and the state as it is now: whatever changes the state calls it again.
    """
    _prepare(module, plan, rewritten(plan))


def _prepare(module: nn.Module, plan: Plan, weights: Iterable[str]) -> None:
    for weight in weights:
        base = _base(module, plan, weight)
        prepared = _prepared(module, plan, weight, base)
        if weight in plan.packed:
            pack(module, plan.packed[weight], prepared)
            continue
        now = get_attribute(module, weight)
        if now.data_ptr() != prepared.data_ptr() and not torch.equal(now, prepared):
            own = prepared.clone() if prepared.data_ptr() == base.data_ptr() else prepared
            set_tensor(module, weight, nn.Parameter(own, requires_grad=False))


def rewritten(plan: Plan) -> list[str]:
    """The weights that `prepare` writes."""
    return list(dict.fromkeys(binding.site.parameters[0] for binding in plan.bindings if _prepares(binding)))


def _prepares(binding: Binding) -> bool:
    return isinstance(binding.site, Projection) and binding.method.prepares


def _here(plan: Plan, binding: Binding) -> Here:
    """The storage of the weight, for a method that takes its part out before the weight is packed."""
    item = plan.packed.get(binding.site.parameters[0]) if _prepares(binding) else None
    return Here(storage=None if item is None else item.storage)


def _base(module: nn.Module, plan: Plan, weight: str) -> Tensor:
    """The base model's tensor, where the compiled model computes."""
    item = plan.packed.get(weight)
    device = get_attribute(module, weight if item is None or not is_packed(module, item) else item.first).device
    return plan.captured.frozen(weight).to(device)


def _prepared(module: nn.Module, plan: Plan, weight: str, base: Tensor) -> Tensor:
    """The base's weight less what methods take out of it, or with what they add; itself, if none does."""
    whole = base
    for binding in plan.bindings:
        site = binding.site
        if not _prepares(binding) or not isinstance(site, Projection) or site.weight != weight:
            continue
        state = {name: get_attribute(module, full).detach() for name, full in binding.names.items()}
        part = dense_weight(whole, site)
        prepared = binding.method.prepare(site, part, state, _here(plan, binding))
        if prepared is part:
            continue
        if bool((part.isfinite() & ~prepared.isfinite()).any()):
            dtype = str(part.dtype).removeprefix("torch.")
            problem = LeavesNoNumbers(method=binding.method.name, weight=weight, dtype=dtype, span=binding.span)
            raise PeftcError(problem)
        whole = whole.clone() if whole is base else whole
        replace_rows(whole, site, prepared)
    return whole


def _start(spec: State, reference: Tensor) -> Tensor:
    """State learns in fp32 where the base is in half precision, as in HF PEFT."""
    dtype = spec.dtype or (torch.float32 if reference.dtype in HALF else reference.dtype)
    return spec.init(torch.empty(spec.shape, dtype=dtype, device=reference.device))


# Files to start from


def _load_start(binding: Binding, tensors: dict[str, Tensor]) -> None:
    """Fills the tensors of `binding` that its method reads from a file, by their full names.

    The path is relative to the spec's folder (the working folder, for a spec that is no file) and must not lead out of
    it, symbolic links resolved.

    Raises:
        PeftcError: `bad-state-file` if it does, or if the file lacks a tensor or has one of another shape.
    """
    asked = binding.method.reads()
    if asked is None:
        return
    name, prefix = asked

    def bad(reason: str) -> PeftcError:
        return PeftcError(BadStateFile(path=name, reason=reason, span=binding.span))

    found = _read(_inside(Path(binding.span.source.name).parent, name, bad), bad)
    for own, tensor in tensors.items():
        if not own.startswith(prefix):
            continue
        full = binding.names[own]
        if full not in found:
            raise bad(f"it has no tensor {full}")
        if found[full].shape != tensor.shape:
            raise bad(f"its {full} is {list(found[full].shape)}, and {list(tensor.shape)} is needed here")
        tensor.copy_(found[full])


def _inside(folder: Path, name: str, bad: Bad) -> Path:
    try:
        path = (folder / name).resolve()
        path = path / IN_FOLDER if path.is_dir() else path
        if not path.resolve().is_relative_to(folder.resolve()):
            raise bad(f"it lies outside {folder.resolve()}, the folder of the spec")
        if not path.is_file():
            raise bad(f"there is no file {path.name} there" if path.parent.is_dir() else "there is no such file")
    except (OSError, ValueError, RuntimeError) as error:
        raise bad(str(error)) from None
    return path


def _read(path: Path, bad: Bad) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except (OSError, ValueError) as error:
        raise bad(f"it is no safetensors file ({error})") from None
