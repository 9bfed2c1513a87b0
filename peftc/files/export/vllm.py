"""What vLLM serves: a LoRA folder of HF PEFT's form, of which it accepts less, or a merged model with all its files.

As of vllm/lora (peft_helper.py, lora_model.py, layers/logits_processor.py) and vllm/config/lora.py: one rank and one
alpha for all layers, whose patterns it passes by; ranks up to the largest `--max-lora-rank`; neither DoRA nor weights
of the base model; linear layers, and a head of so many tokens at most.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftc.diagnostics.diagnostic import Diagnostic, PeftcError
from peftc.files.errors import BadOutput
from peftc.files.export.branches import Change, changes_of
from peftc.files.export.errors import AS_MERGED, NotInVllm
from peftc.files.folder import replacing
from peftc.files.hf_peft.modules import PREFIX
from peftc.files.hf_peft.names import Names, saying
from peftc.files.hf_peft.places.experts import A, B
from peftc.files.hf_peft.places.layers import unfit
from peftc.files.merge import merge
from peftc.protocol.site import Linear
from peftc.runtime.module import Runtime

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank
LARGEST_HEAD = 258048  # tokens
NO_MODEL = "save it by save() or merge(), for peftc or PyTorch"


def served_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` that takes an adapter of a rank, which is one of `RANKS` at most."""
    return next(allowed for allowed in RANKS if allowed >= rank)


def export_adapter(compiled: Runtime, folder: Path, dtype: str | None) -> list[Change]:
    """Writes the adapter's folder, and returns what is in it.

    Raises:
        PeftcError: `not-in-vllm`, once for each thing that vLLM would refuse, or take for something else; `bad-output`
            if something is at `folder`; `cannot-write`.
    """
    changes, odd = changes_of(compiled)
    problems: list[Diagnostic] = [NotInVllm(reason=one.reason, instead=AS_MERGED, span=one.span) for one in odd]
    sites = {site.owner: site for site in compiled.plan.sites if isinstance(site, Linear) and site.rows is None}
    for change in changes:
        if (reason := _reason(compiled.base, change, sites[change.parameter])) is not None:
            problems.append(NotInVllm(reason=reason, instead=AS_MERGED, span=change.span))
    if not changes and not problems:
        problems.append(NotInVllm(reason="nothing was learned", instead="compile a spec that has a method"))
    if problems:
        raise PeftcError(*problems)
    config, tensors = _folder(compiled, changes)
    kept = {name: tensor if dtype is None else tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    with replacing(folder, lambda there: None if there == set() else BadOutput(folder=str(folder))) as new:
        safetensors.torch.save_file(kept, new / "adapter_model.safetensors")
        (new / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return changes


def export_merged(compiled: Runtime, folder: Path, dtype: str | None, tokenizer: Any) -> int:
    """Writes the merged model with its config, tokenizer and generation_config; returns how many tensors it has.

    Raises:
        PeftcError: as `merge`; `not-in-vllm`; `bad-output` if something is at `folder`; `cannot-write`.
    """
    model = merge(compiled)
    if not isinstance(model, PreTrainedModel):
        reason = f"a {type(model).__name__} is no model of transformers, whose folders it reads"
        raise PeftcError(NotInVllm(reason=reason, instead=NO_MODEL))
    if dtype is not None:
        model.to(getattr(torch, dtype))
    with replacing(folder, lambda there: None if there == set() else BadOutput(folder=str(folder))) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    return len(model.state_dict())


def _reason(base: nn.Module, change: Change, site: Linear) -> str | None:
    """Why vLLM would not take a layer's change, or None."""
    if change.transposed or type(base.get_submodule(change.module)) is not nn.Linear:
        return f"it adapts linear layers, and {change.module} is a {type(base.get_submodule(change.module)).__name__}"
    if (reason := unfit(base, site)) is not None:
        return reason
    if change.rank > RANKS[-1]:
        return f"{change.module} has rank {change.rank}, and it serves {RANKS[-1]} at most"
    if "head" in site.roles and change.b.shape[0] > LARGEST_HEAD:
        return f"{change.module} is a head of {change.b.shape[0]} tokens, of which it adapts {LARGEST_HEAD} at most"
    return None


def _folder(compiled: Runtime, changes: list[Change]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors, all layers of the largest rank and the first one's scale."""
    rank, scale = max(change.rank for change in changes), changes[0].scale
    modules = [change.module for change in changes]
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "lora_dropout": 0.0, "use_rslora": False,
        "use_dora": False, "bias": "none", "modules_to_save": None, "inference_mode": True,
        "base_model_name_or_path": getattr(compiled.config, "_name_or_path", None) or None, "task_type": None,
        "target_modules": saying(compiled.base, modules),
    }  # fmt: skip
    if Names(compiled.base, config).modules() != set(modules):
        raise PeftcError(NotInVllm(reason="its names would mean other layers, too", instead=AS_MERGED))
    tensors = {}
    for change in changes:
        more = rank - change.rank
        tensors[f"{PREFIX}{change.module}.{A}"] = nn.functional.pad(change.a, (0, 0, 0, more))
        b = change.b if change.scale == scale else change.b * (change.scale / scale)
        tensors[f"{PREFIX}{change.module}.{B}"] = nn.functional.pad(b, (0, more))
    return config, {name: tensor.contiguous() for name, tensor in tensors.items()}
