"""Adapters of kohya's scripts and of LyCORIS, one .safetensors file each, as HF PEFT's folders have them.

`NAME.lora_down.weight`, `NAME.lora_up.weight` and `NAME.alpha` are LoRA's A, B and alpha, of `hada_…` LoHa's. In NAME
the module's dots may be underscores, behind a word for the part of the model: then the model says which are which.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftc.capture.checkpoints.ondisk import read_tensors
from peftc.diagnostics.diagnostic import PeftcError
from peftc.files.errors import BadArtifact
from peftc.files.hf_peft.folder import Files
from peftc.files.hf_peft.names import key_for, pattern_of
from peftc.files.hf_peft.saved import PREFIX

LORA = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
LOHA = {name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
KINDS = {"LORA": (LORA, "lora_down.weight", "lora_alpha"), "LOHA": (LOHA, "hada_w1_b", "alpha")}
PARTS = re.compile(r"^(lora|lycoris)_(unet_|te\d?_|transformer_|prior_)?")  # of the model, before a name without dots


def read(path: Path, model: nn.Module | None = None) -> Files:
    """The settings and tensors of a file; `model` says where the dots of its names are.

    Raises:
        PeftcError: `bad-artifact` where it is no such file, holds another method, or its names cannot be told.
    """

    def bad(reason: str) -> PeftcError:
        return PeftcError(BadArtifact(folder=str(path), reason=reason))

    try:
        tensors = read_tensors(path)
    except (OSError, ValueError) as error:
        raise bad(f"{type(error).__name__}: {error}") from None
    alphas, own = dict[str, Tensor](), defaultdict[str, dict[str, Tensor]](dict)
    for key, tensor in tensors.items():
        end = next((end for end in (*LORA, *LOHA, "alpha") if key.endswith(f".{end}")), None)
        if end is None:
            raise bad(f"its {key} is no part of LoRA or LoHa, as kohya's scripts and LyCORIS have them")
        name = key.removesuffix(f".{end}")
        if end == "alpha":
            alphas[name] = tensor
        else:
            own[name][end] = tensor
    names = _told(own, model, bad)
    whole = {kind: known.keys() for kind, (known, *_) in KINDS.items()}
    kinds = {next((kind for kind, keys in whole.items() if keys == found.keys()), "") for found in own.values()}
    if len(kinds) != 1 or "" in kinds:
        raise bad("it holds several methods, or parts of them")
    (kind,) = kinds
    known, narrow, alpha = KINDS[kind]
    ranks = {names[name]: len(found[narrow]) for name, found in own.items()}
    scales = {names[name]: float(alphas[name]) if name in alphas else float(ranks[names[name]]) for name in own}
    rank, scale = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, scales))
    config: dict[str, Any] = {
        "peft_type": kind, "target_modules": pattern_of(names.values()), "r": rank, alpha: scale,
        "rank_pattern": {key_for(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {key_for(name): value for name, value in scales.items() if value != scale},
    }  # fmt: skip
    return Files(config, {
        f"{PREFIX}{names[name]}.{known[end]}": tensor for name, found in own.items() for end, tensor in found.items()
    })  # fmt: skip


def _told(found: Iterable[str], model: nn.Module | None, bad: Any) -> dict[str, str]:
    """The names of modules that a file's names mean."""
    flat = defaultdict[str, list[str]](list)
    for name, _ in model.named_modules() if model is not None else ():
        flat[name.replace(".", "_")].append(name)
    told: dict[str, str] = {}
    for name in found:
        inner = PARTS.sub("", name)
        if model is None and "." not in name:
            raise bad(f"where the dots of {name} are the model says: give it, with --model or as load_peft's first")
        if model is None:
            told[name] = name
            continue
        meant = flat.get(name.replace(".", "_"), flat.get(inner.replace(".", "_"), []))
        if len(meant) != 1:
            raise bad(f"its {name} is {'several modules' if meant else 'no module'} of the model")
        told[name] = meant[0]
    return told
