"""HF PEFT's folders for prefixes: the keys and values of all layers in one tensor, [length, layers * 2 * width]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftc.capture.inputs import example_inputs
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.source import Source
from peftc.diagnostics.timings import Timings
from peftc.driver import pipeline
from peftc.files.artifact import check_tensors
from peftc.files.errors import BadArtifact, CannotExport
from peftc.files.peft_prompt import task_of
from peftc.graph.ir import get_attribute
from peftc.language.syntax import parse
from peftc.protocol.method import methods
from peftc.protocol.site import Attention
from peftc.runtime.module import CompiledModule

KIND = "PREFIX_TUNING"
TENSOR = "prompt_embeddings"
PARTS = ("keys", "values")
TASKS = ("CAUSAL_LM", "FEATURE_EXTRACTION")  # of others it keeps a classifier, too, or shares prefixes among layers


def has_prefix(compiled: CompiledModule) -> bool:
    """Whether the model has a prefix, and so belongs into a folder of this kind."""
    return any(binding.method.peft_type == KIND for binding in compiled.plan.bindings)


def prefix_folder(compiled: CompiledModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors of a model whose one statement is a prefix on every layer's attention.

    Raises:
        PeftcError: `cannot-export` where it is not that.
    """
    bindings = compiled.plan.bindings
    if reason := _reason(compiled):
        raise PeftcError(CannotExport(reason=reason, span=bindings[0].span))
    config: dict[str, Any] = {}
    parts: list[Tensor] = []
    for binding in bindings:
        state = {name: get_attribute(compiled, full).detach() for name, full in binding.names.items()}
        settings, own = binding.method.to_peft(binding.site, state)
        if config and config != settings:
            raise PeftcError(CannotExport(reason="all layers have prefixes of one shape there", span=binding.span))
        config = settings
        parts += [own[part] for part in PARTS]
    settings = config | {
        "num_layers": len(bindings), "num_transformer_submodules": 1, "task_type": task_of(compiled),
        "inference_mode": True, "base_model_name_or_path": getattr(compiled.config, "_name_or_path", None) or None,
    }  # fmt: skip
    return settings, {TENSOR: torch.cat(parts, 1)}


def _reason(compiled: CompiledModule) -> str | None:
    bindings = compiled.plan.bindings
    if (task := task_of(compiled)) not in TASKS:
        return f"peftc does not write its form for {task}"
    every = [site.name for site in compiled.plan.sites if isinstance(site, Attention)]
    if [binding.site.name for binding in bindings] != every:
        return "it has prefixes for all layers"
    if not bindings[0].method.windowed and getattr(compiled.config, "sliding_window", None):
        return "the model's sliding window passes its prefixes by: compile with windowed=true"
    return None


def load_prefix(model: nn.Module, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> CompiledModule:
    """`model` compiled with the prefix of a folder.

    Raises:
        PeftcError: `bad-artifact` if it holds anything else.
    """
    layers = config.get("num_layers")
    flat = tensors[TENSOR]
    if set(tensors) != {TENSOR} or config.get("num_transformer_submodules") != 1 or not isinstance(layers, int):
        raise PeftcError(BadArtifact(folder=str(folder), reason="it holds a prefix in a form peftc does not have"))
    if flat.dim() != 2 or layers < 1 or flat.shape[1] % (2 * layers):
        raise PeftcError(BadArtifact(folder=str(folder), reason=f"its prefix has the shape {tuple(flat.shape)}"))
    parts = flat.chunk(2 * layers, 1)
    pairs = [dict(zip(PARTS, parts[start : start + 2], strict=True)) for start in range(0, 2 * layers, 2)]
    name, (settings, _) = next(
        (cls.name, found) for cls in methods().values() if (found := cls.from_peft(config, "", pairs[0]))
    )
    arguments = ", ".join(f"{key}={str(value).lower()}" for key, value in settings.items())
    spec = parse(Source(f"{folder.name}/adapter_config.json", f"apply {name}({arguments}) to attn"))
    plan = pipeline.plan_model(model, spec, example_inputs(model), Timings())
    if len(plan.bindings) != layers:
        reason = f"it has {layers} layers, and the model {len(plan.bindings)}"
        raise PeftcError(BadArtifact(folder=str(folder), reason=reason))
    state = {
        binding.names[part]: tensor
        for binding, pair in zip(plan.bindings, pairs, strict=True)
        for part, tensor in pair.items()
    }
    check_tensors(folder, plan, state)
    return pipeline.build(plan, Timings(), state)
