"""What a model is for, as HF PEFT's folders say it, so that its Auto classes make the same base model again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from peftc.diagnostics.diagnostic import PeftcError
from peftc.files.errors import BadArtifact
from peftc.runtime.module import Runtime

# HF PEFT's word, and transformers' own list of which class its Auto class makes of a config.
KINDS = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
}
# What peftc calls the same, of a reference.
REFERENCES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
# Modules that HF PEFT saves with a model for a task.
HEADS: Mapping[Any, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def kind_of(model: nn.Module) -> str | None:
    """HF PEFT's `task_type` of a model, None where it has none for it."""
    if not isinstance(model, PreTrainedModel):
        return None
    for kind, mapping in KINDS.items():
        made = getattr(modeling_auto, mapping).get(type(model.config), ())
        if type(model) in (made if isinstance(made, tuple) else (made,)):
            return kind
    return None


def about(compiled: Runtime, *, told: bool = True) -> dict[str, Any]:
    """The settings that say what base model a folder is for; without its `task_type` where that is not `told`.

    A folder without one names the class itself.
    """
    base = compiled.base
    kind = kind_of(base) if told else None
    settings = {
        "base_model_name_or_path": getattr(compiled.config, "_name_or_path", None) or None,
        "inference_mode": True,
        "task_type": kind,
    }
    if kind is None and isinstance(base, PreTrainedModel):
        home = type(base).__module__
        settings["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": home}
    return settings


def base_named(folder: Path, config: Mapping[str, Any]) -> str:
    """The folder or hub id of the base model that an adapter's settings name.

    Raises:
        PeftcError: `bad-artifact` where there is none, or another revision than the latest is meant.
    """
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    reason = ""
    if not isinstance(name, str) or not name or name.endswith((".py", ".gguf", ".json")) or ".py:" in name:
        reason = "it does not say where its base model is"
    elif revision not in (None, "main"):
        reason = f"its base model is revision {revision} of {name}"
    if reason:
        raise PeftcError(BadArtifact(folder=str(folder), reason=f"{reason}: pass the model, load_peft(model, folder)"))
    return str(name)


def head_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What of a reference says which class the base model has, and with how many labels."""
    kind = config.get("task_type")
    if kind in REFERENCES:
        return {"task": REFERENCES[kind], "labels": _labels(HEADS.get(kind, ()), tensors)}
    named = config.get("auto_mapping")
    known = named.get("base_model_class") if isinstance(named, dict) else None
    return {"model_class": known} if isinstance(known, str) else {}


def _labels(heads: tuple[str, ...], tensors: Mapping[str, Tensor]) -> int | None:
    """The outputs of a head's narrowest matrix; None where there is none."""
    ends = tuple(f"{head}." for head in heads)
    found = [len(t) for key, t in tensors.items() if t.dim() == 2 and any(f".{end}" in f".{key}" for end in ends)]
    return min(found, default=None)
