"""LoRA in HF PEFT's folders as numbers, without a base model: the pair of thin matrices at each place, and back."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from peftc.diagnostics.diagnostic import PeftcError
from peftc.files.adapters.sums import Pair
from peftc.files.errors import BadArtifact, CannotCombine
from peftc.files.folder import write_folder
from peftc.files.hf_peft import biases
from peftc.files.hf_peft.folder import CONFIG, TENSORS, Files
from peftc.files.hf_peft.names import Names, key_for, pattern_of
from peftc.files.hf_peft.saved import PREFIX, SAVED, TYING, without_adapter_name
from peftc.files.hf_peft.spec import OF_THE_WEIGHT, of_kind, unknown

A, B = ".lora_A.weight", ".lora_B.weight"
PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
# Settings that say which modules are meant, beside a list of their names.
NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class Pairs:
    """What one adapter is: pairs by module, and the base model's own tensors that learned, by name."""

    pairs: dict[str, Pair]
    learned: dict[str, Tensor]


def pairs_in(folder: Path, files: Files) -> Pairs:
    """The pairs of a folder.

    Raises:
        PeftcError: `cannot-combine` where it holds another method, or LoRA in a way that no sum is made of;
            `bad-artifact` where its settings and its tensors differ.
    """

    def refused(reason: str) -> PeftcError:
        return PeftcError(CannotCombine(folder=str(folder), reason=reason))

    config = files.config
    if config.get("peft_type") != "LORA":
        raise refused(f"it holds {config.get('peft_type')}, and pairs of thin matrices, LoRA, are what can be combined")
    read = {SAVED, TYING}.union(*(cls.obeyed() for cls in of_kind("LORA"))) - {"use_dora", "target_parameters"}
    option = unknown(config, read - {"use_dora"})
    if config.get("target_parameters"):
        option = f"target_parameters={config['target_parameters']}"
    elif config.get("init_lora_weights") in OF_THE_WEIGHT:
        option = f"init_lora_weights={config['init_lora_weights']}"
    if option:
        raise refused(f"no sum is made of LoRA with {option}")
    tensors = without_adapter_name(nn.Module(), files.tensors)
    names, pairs = Names(nn.Module(), config), dict[str, Pair]()
    for key in [key for key in tensors if key.endswith(A) and key.startswith(PREFIX)]:
        module = key.removeprefix(PREFIX).removesuffix(A)
        a, b = tensors.pop(key), tensors.pop(key.removesuffix(A) + B, None)
        if a.dim() > 2:
            raise refused(f"no sum is made of LoRA at convolutions, such as {module}")
        settings = names.settings(module, PATTERNS)
        r, alpha = settings.get("r", 8), settings.get("lora_alpha", 8)
        if b is None or a.dim() != 2 or b.dim() != 2 or not len(a) == b.shape[1] == r:
            reason = f"its lora_A and lora_B at {module} are no pair of rank r={r}, as its settings say"
            raise PeftcError(BadArtifact(folder=str(folder), reason=reason))
        pairs[module] = Pair(a, b, alpha / (math.sqrt(r) if config.get("use_rslora") else r))
    if odd := sorted(key for key in tensors if ".lora_" in key or not key.startswith(PREFIX)):
        raise refused(f"no sum is made of its {odd[0]}")
    return Pairs(pairs, {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()})


def write_pairs(folder: Path, combined: Pairs, configs: list[Mapping[str, Any]]) -> None:
    """Writes the folder of one adapter that was made of several, whose settings `configs` are.

    Raises:
        PeftcError: `cannot-combine` where different biases of the base model learned; `bad-artifact` and `cannot-write`
            as for `save_pretrained`.
    """
    first, pairs = configs[0], combined.pairs
    learning = {config.get(biases.SETTING) or biases.NONE for config in configs}
    if len(learning) > 1:
        reason = f"their settings of bias are {', '.join(sorted(learning))}, and one adapter has one"
        raise PeftcError(CannotCombine(folder="", reason=reason))
    (bias,) = learning
    rank = Counter(pair.rank for pair in pairs.values()).most_common(1)[0][0]
    others = {key_for(module): pair.rank for module, pair in pairs.items() if pair.rank != rank}
    saved = [entry for config in configs for entry in config.get(SAVED) or ()]
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others,
        "lora_dropout": first.get("lora_dropout", 0.0), biases.SETTING: bias, "use_rslora": False, "use_dora": False,
        "target_modules": _targets(pairs, configs), SAVED: list(dict.fromkeys(saved)) or None,
        TYING: any(config.get(TYING) for config in configs), "inference_mode": True,
        **{name: first.get(name) for name in ("task_type", "auto_mapping", "base_model_name_or_path", "revision")},
    }  # fmt: skip
    tensors = {f"{PREFIX}{module}{A}": pair.a for module, pair in pairs.items()}
    tensors |= {f"{PREFIX}{module}{B}": pair.b for module, pair in pairs.items()}
    tensors |= {PREFIX + name: tensor for name, tensor in combined.learned.items()}
    blob = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    write_folder(folder, {TENSORS: blob, CONFIG: json.dumps(config, indent=2).encode()})


def _targets(pairs: Mapping[str, Pair], configs: list[Mapping[str, Any]]) -> str | list[str]:
    """All that each of them chooses together: their lists' words, or a pattern for these modules alone."""
    lists = [config.get("target_modules") for config in configs]
    words = {word for given in lists if isinstance(given, list) for word in given}
    narrowed = any(config.get(name) not in (None, []) for config in configs for name in NARROWING)
    if narrowed or not all(isinstance(given, list) for given in lists):
        return pattern_of(pairs)
    return sorted(words)
