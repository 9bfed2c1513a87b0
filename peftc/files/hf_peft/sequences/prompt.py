"""HF PEFT's folders for prompts: one tensor for the model as a whole, and what the model is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftc.diagnostics.diagnostic import PeftcError
from peftc.files.errors import BadArtifact, CannotExport
from peftc.files.hf_peft.spec import applied, of_kind, trained
from peftc.graph.ir import get_attribute
from peftc.language import Statement
from peftc.planning.plan import Plan
from peftc.protocol.site import Sequence
from peftc.runtime.module import Runtime

PROMPTS = ("PROMPT_TUNING", "P_TUNING")
TENSOR = "prompt_embeddings"
ROOT = "base_model."
# Without one of these HF PEFT passes a prompt by.
TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# Of these the folder also holds what stands behind the backbone, such as a classifier, learned or not.
WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS")


def has_prompt(compiled: Runtime) -> bool:
    """Whether the model has a prompt, and so belongs into a folder of this kind."""
    return any(isinstance(binding.site, Sequence) for binding in compiled.plan.bindings)


def prompt_folder(compiled: Runtime) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors of a model whose one method is a prompt."""
    (binding,) = compiled.plan.bindings
    state = {name: get_attribute(compiled, full).detach() for name, full in binding.names.items()}
    settings, tensors = binding.method.to_peft(binding.site, state)
    kind = task_of(compiled)
    settings |= {"task_type": kind, "num_transformer_submodules": 1, "inference_mode": True,
                 "base_model_name_or_path": getattr(compiled.config, "_name_or_path", None) or None}  # fmt: skip
    learning, heads = compiled.plan.trained, _heads(compiled.base) if kind in WITH_HEAD else {}
    if odd := [name for name in learning if name not in heads]:
        reason = f"beside a prompt it holds no parameters of the base model but a classifier's, and {odd[0]} learns"
        raise PeftcError(CannotExport(reason=reason, span=learning[odd[0]]))
    if kind in WITH_HEAD:
        settings["modules_to_save"] = sorted({name.partition(".")[0] for name in heads})
        tensors |= {
            ROOT + name: get_attribute(compiled, name).detach()
            if name in learning
            else compiled.plan.captured.frozen(name)
            for name in heads
        }
    return settings, tensors


def task_of(compiled: Runtime) -> str:
    """What the model is for: HF PEFT puts a prompt into its input by that."""
    if getattr(compiled.config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    if getattr(compiled.base, "can_generate", bool)():
        return "CAUSAL_LM"
    if "labels" not in compiled.convention.inputs:
        return "FEATURE_EXTRACTION"
    labels = compiled.plan.input_values[compiled.convention.inputs.index("labels")]
    return "SEQ_CLS" if labels.dim() == 1 or labels.is_floating_point() else "TOKEN_CLS"


def _heads(base: nn.Module) -> dict[str, Tensor]:
    """The parameters outside of the backbone that a transformers model names."""
    backbone = base.base_model_prefix if isinstance(base, PreTrainedModel) else ""
    return {name: tensor for name, tensor in base.named_parameters() if name.partition(".")[0] != backbone}


def read_prompt(
    model: nn.Module, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[list[Statement], Callable[[Plan], dict[str, Tensor]]]:
    """The statements, and what makes the state, of a folder with a prompt; the base's tensors that differ learn on.

    Raises:
        PeftcError: `bad-artifact` if it holds anything else.
    """

    def bad(reason: str) -> PeftcError:
        return PeftcError(BadArtifact(folder=str(folder), reason=reason))

    own = {TENSOR: embeddings(config, tensors, bad)}
    for name, fits in (("task_type", TASKS), ("token_dim", (None, own[TENSOR].shape[1]))):
        if config.get(name) not in fits:
            raise bad(f"its {name}={config.get(name)} is none that it can have")
    base = dict(model.named_parameters())
    saved = tuple(f".{name}" for name in config.get("modules_to_save") or ())
    if missing := [key for key in base if _lies_in(key, saved) and ROOT + key not in tensors]:
        raise bad(f"it has no {ROOT}{missing[0]}, which its modules_to_save say it has")
    learned = {key.removeprefix(ROOT): tensor for key, tensor in tensors.items() if key != TENSOR}
    name, settings, state = next(
        (cls.name, *found) for cls in of_kind(PROMPTS[0]) if (found := cls.from_peft(config, "", own))
    )
    if odd := [key for key, tensor in learned.items() if key not in base or base[key].shape != tensor.shape]:
        raise bad(f"its {odd[0]} is no parameter of the model")
    learned = {key: tensor for key, tensor in learned.items() if not torch.equal(base[key].cpu(), tensor)}

    def everything(plan: Plan) -> dict[str, Tensor]:
        (binding,) = plan.bindings
        return learned | {binding.names[tensor]: value for tensor, value in state.items()}

    return [applied(name, settings), *map(trained, learned)], everything


def embeddings(config: dict[str, Any], tensors: dict[str, Tensor], bad: Callable[[str], PeftcError]) -> Tensor:
    """The one tensor of a prompt or a prefix, [virtual tokens * submodules, any], as many rows as the settings say.

    Raises:
        PeftcError: as `bad` makes it, where it is not there, or has another number of rows.
    """
    if TENSOR not in tensors:
        raise bad(f"it has no {TENSOR}")
    found, length = tensors[TENSOR], config.get("num_virtual_tokens")
    parts = config.get("num_transformer_submodules") or (2 if config.get("task_type") == "SEQ_2_SEQ_LM" else 1)
    rows = length * parts if isinstance(length, int) and isinstance(parts, int) else 0
    if found.dim() != 2 or not found.numel() or len(found) != rows:
        says = f"num_virtual_tokens={length} and num_transformer_submodules={parts}"
        raise bad(f"its {TENSOR} is {tuple(found.shape)}, where the settings say {says}")
    return found


def _lies_in(key: str, modules: tuple[str, ...]) -> bool:
    """Whether a parameter is of a module whose name ends in one of `modules`, each with a dot before it."""
    parts = f".{key}".split(".")
    return any(".".join(parts[:end]).endswith(modules) for end in range(2, len(parts))) if modules else False
