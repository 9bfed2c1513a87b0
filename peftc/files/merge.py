"""Folding every method into plain weights: a model of the base's own class that computes the same."""

from __future__ import annotations

import copy
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftc.capture.checkpoints.bitsandbytes import PackedFile
from peftc.capture.islands import remembered
from peftc.diagnostics.diagnostic import Diagnostic, PeftcError
from peftc.files.errors import BadOutput, CannotMerge, NotFinite
from peftc.files.folder import replacing
from peftc.graph.ir import get_attribute, set_tensor
from peftc.planning.plan import Binding
from peftc.protocol.site import Projection
from peftc.rewrite.packed import frozen_weight
from peftc.rewrite.weights import dense_weight, replace_rows, take
from peftc.runtime.module import Runtime


def merge(compiled: Runtime) -> nn.Module:
    """A deep copy of the base model with every change folded in; `compiled` and the base stay as they are.

    A weight that was packed comes back in the base's own precision, as what its numbers stand for.

    Raises:
        PeftcError: `cannot-merge`, one for each statement whose method has no plain weight that does the same;
            `not-finite`, one for each weight of which a number would not be, that is in the base.
    """
    problems = list(_problems(compiled))
    if problems:
        raise PeftcError(*problems)
    plan = compiled.plan
    model = copy.deepcopy(compiled.base, remembered(compiled.base))
    by_weight: dict[tuple[str, str], list[Binding]] = defaultdict(list)  # of what is tied each reader has its own
    for binding in plan.bindings:
        assert isinstance(binding.site, Projection)
        by_weight[binding.site.weight, binding.site.owner].append(binding)
    with torch.no_grad():
        whole = (*plan.trained, *compiled.watch.unplanned(compiled))
        for name in whole:
            for alias in plan.captured.aliases.get(name, [name]):
                get_attribute(model, alias).copy_(get_attribute(compiled, name))
        for name in plan.packed:
            write(compiled, model, name, frozen_weight(compiled, plan, name))
        for (weight, _), bindings in by_weight.items():
            _fold(compiled, model, weight, bindings)
        sites = [bindings[0].site for bindings in by_weight.values()]
        folded = {site.weight: site.owner for site in sites if isinstance(site, Projection)}
        folded |= {site.bias: site.bias for site in sites if isinstance(site, Projection) and site.bias}
        written = folded | {name: name for name in (*whole, *plan.packed) if name not in folded}
        check_finite(compiled, {name: get_attribute(model, path) for name, path in written.items()})
    return model


def check_finite(compiled: Runtime, merged: Mapping[str, Tensor]) -> None:
    """Raises PeftcError `not-finite` with every weight of which a number is not finite, and is in the base model."""
    problems = []
    for name, tensor in merged.items():
        lost = ~tensor.detach().isfinite()
        if not lost.any():
            continue
        lost &= compiled.plan.captured.frozen(name).to(tensor.device).isfinite()
        if count := int(lost.sum()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            problems.append(NotFinite(weight=name, count=count, dtype=dtype, learned=_learned(compiled, name)))
    if problems:
        raise PeftcError(*problems)


def _learned(compiled: Runtime, name: str) -> bool:
    """Whether all that was learned for a weight or bias is finite."""
    sites = ((binding, binding.site) for binding in compiled.plan.bindings)
    here = [full for b, site in sites if name in site.parameters for full in b.names.values()]
    learned = [get_attribute(compiled, full) for full in (*here, *({name} & compiled.plan.trained.keys()))]
    return all(bool(tensor.isfinite().all()) for tensor in learned)


def write(compiled: Runtime, model: nn.Module, name: str, weight: Tensor) -> None:
    """Sets a weight under every name that it has; in a base whose packed weights were let go of there is none yet."""
    now = get_attribute(model, name)
    if not now.is_meta:
        now.copy_(weight)
        return
    made = nn.Parameter(weight.contiguous(), requires_grad=now.requires_grad)
    for alias in compiled.plan.captured.aliases.get(name, [name]):
        set_tensor(model, alias, made)


def _problems(compiled: Runtime) -> list[Diagnostic]:
    found: dict[int, Diagnostic] = {}
    for binding in compiled.plan.bindings:
        reason = binding.method.unmergeable_at(binding.site)
        if (
            reason is None
            and isinstance(binding.site, Projection)
            and (binding.method.adds_bias(binding.site) and binding.site.bias is None)
        ):
            reason = f"{binding.site.name} has no bias to take the shift"
        if reason and binding.statement not in found:
            found[binding.statement] = CannotMerge(method=binding.method.name, reason=reason, span=binding.span)
    return list(found.values())


def _fold(compiled: Runtime, model: nn.Module, weight: str, bindings: list[Binding]) -> None:
    """Folds all that stands on one weight, in the order in which it acts."""
    first = bindings[0].site
    assert isinstance(first, Projection)
    stored = frozen_weight(compiled, compiled.plan, weight).clone()
    bias = get_attribute(compiled, first.bias).detach().clone() if first.bias else None
    for binding in bindings:
        site = binding.site
        assert isinstance(site, Projection)
        state = {name: get_attribute(compiled, full).detach() for name, full in binding.names.items()}
        part = None if bias is None else take(bias, site, -1)
        before = dense_weight(stored, site)
        new_weight, new_bias = binding.method.fold(site, before, part, state)
        if new_weight is not before:  # a part of a fused weight cannot be written over itself
            replace_rows(stored, site, new_weight)
        if bias is not None and new_bias is not None and new_bias is not part:
            bias[slice(None) if site.rows is None else list(site.rows)] = new_bias
    _store(model, first, stored)
    if bias is not None and first.bias:
        get_attribute(model, first.bias).copy_(bias)


def _store(model: nn.Module, site: Projection, weight: Tensor) -> None:
    """Writes a folded weight. A tied one becomes the layer's own, so that the other layer keeps what it had."""
    if not site.tied:
        get_attribute(model, site.owner).copy_(weight)
        return
    owner, _, leaf = site.owner.rpartition(".")
    before = get_attribute(model, site.owner)
    setattr(model.get_submodule(owner), leaf, nn.Parameter(weight.to(before.device, before.dtype)))
    config = getattr(model, "config", None)
    if config is not None:
        config.tie_word_embeddings = False


def save_merged(model: nn.Module, folder: str | Path, packed: PackedFile | None = None) -> bool:
    """Writes a merged model as its library does, whole or not at all; the tokenizer goes with it.

    With `packed` its layers are written as bitsandbytes packs them, and the configuration says so: returns whether
    they are, which they cannot be where the library's files have other tensors than its model has.

    Raises:
        PeftcError: `bad-output` if something stands at `folder` already; `cannot-write` where the system refuses.
    """
    is_packed = False
    with replacing(Path(folder), lambda there: None if there == set() else BadOutput(folder=str(folder))) as new:
        if isinstance(model, PreTrainedModel):
            is_packed = packed is not None and packed.saved(model, new)
            if not is_packed:
                model.save_pretrained(new)
            _copy_tokenizer(model, new)
        else:
            safetensors.torch.save_model(model, str(new / "model.safetensors"))
    return is_packed


def _copy_tokenizer(model: PreTrainedModel, folder: Path) -> None:
    """The tokenizer files beside the base model, where it was read from a folder."""
    source = Path(model.config._name_or_path or "")
    if model.config._name_or_path and source.is_dir():
        for pattern in ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model", "chat_template*"):
            for file in source.glob(pattern):
                shutil.copy2(file, folder / file.name)
