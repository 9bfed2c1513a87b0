"""HF PEFT's folders for prefixes: the keys and values of all layers in one tensor, [length, layers * 2 * width]."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftc.diagnostics.diagnostic import PeftcError
from peftc.files.errors import BadArtifact, CannotExport
from peftc.files.hf_peft.sequences.prompt import TENSOR, embeddings, task_of
from peftc.files.hf_peft.spec import applied, of_kind
from peftc.graph.ir import get_attribute
from peftc.language import Statement
from peftc.planning.plan import Plan
from peftc.protocol.site import Attention
from peftc.runtime.module import Runtime

KIND = "PREFIX_TUNING"
KINDS = (KIND, "CARTRIDGE")  # the other is a prefix that is trained as keys and values, the first of them frozen
PARTS = ("keys", "values")
TASKS = ("CAUSAL_LM", "FEATURE_EXTRACTION")  # of others it keeps a classifier, too, or shares prefixes among layers


def has_prefix(compiled: Runtime) -> bool:
    """Whether the model has a prefix, and so belongs into a folder of this kind."""
    return any(binding.method.peft_type == KIND for binding in compiled.plan.bindings)


def prefix_folder(compiled: Runtime) -> tuple[dict[str, Any], dict[str, Tensor]]:
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


def _reason(compiled: Runtime) -> str | None:
    bindings = compiled.plan.bindings
    if (task := task_of(compiled)) not in TASKS:
        return f"peftc does not write its form for {task}"
    every = [site.name for site in compiled.plan.sites if isinstance(site, Attention)]
    if [binding.site.name for binding in bindings] != every:
        return "it has prefixes for all layers"
    if not bindings[0].method.windowed and getattr(compiled.config, "sliding_window", None):
        return "the model's sliding window passes its prefixes by: compile with windowed=true"
    return None


def read_prefix(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[list[Statement], Callable[[Plan], dict[str, Tensor]]]:
    """The statement, and what makes the state, of a folder with a prefix.

    Raises:
        PeftcError: `bad-artifact` if it holds anything else.
    """

    def bad(reason: str) -> PeftcError:
        return PeftcError(BadArtifact(folder=str(folder), reason=reason))

    flat = embeddings(config, tensors, bad)
    if odd := sorted(tensors.keys() - {TENSOR}):
        raise bad(f"its {odd[0]} is no part of a prefix")
    for name, own in (("num_transformer_submodules", [1]), ("task_type", TASKS)):
        if config.get(name) not in own:
            raise bad(f"its {name}={config.get(name)} is none that peftc has with a prefix")
    layers, width, heads = (config[name] for name in ("num_layers", "token_dim", "num_attention_heads"))
    for name in ("num_layers", "token_dim"):
        if config[name] < 1:
            raise bad(f"its {name}={config[name]} is none of a prefix")
    if flat.shape[1] != 2 * layers * width:
        raise bad(f"its {TENSOR} is {tuple(flat.shape)}, where num_layers={layers} and token_dim={width} say otherwise")
    each = flat.chunk(2 * layers, 1)
    (cls,) = of_kind(KIND)
    read = [
        cls.from_peft(config, "", dict(zip(PARTS, pair, strict=True)))
        for pair in zip(each[::2], each[1::2], strict=True)
    ]

    def state(plan: Plan) -> dict[str, Tensor]:
        if len(plan.bindings) != layers:
            raise bad(f"its num_layers={layers} are not the {len(plan.bindings)} attentions of the model")
        for site in (binding.site for binding in plan.bindings):
            if isinstance(site, Attention) and (site.kv_heads, site.kv_heads * site.key_width) != (heads, width):
                raise bad(f"its num_attention_heads={heads} of token_dim={width} are not those of {site.name}")
        there = zip(plan.bindings, read, strict=True)
        return {b.names[name]: part for b, found in there if found for name, part in found[1].items()}

    assert read[0] is not None
    return [applied(cls.name, read[0][0], role="attn")], state
