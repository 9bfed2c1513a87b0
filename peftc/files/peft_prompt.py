"""HF PEFT's folders for prompts: one tensor for the model as a whole, and what the model is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftc.diagnostics.diagnostic import PeftcError
from peftc.files.errors import BadArtifact
from peftc.files.peft_spec import applied, trained
from peftc.graph.ir import get_attribute
from peftc.language import Statement
from peftc.planning.plan import Plan
from peftc.protocol.method import methods
from peftc.protocol.site import Sequence
from peftc.runtime.module import Runtime

ROOT = "base_model."
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
    if kind in WITH_HEAD:
        heads = _heads(compiled.base)
        settings["modules_to_save"] = sorted({name.partition(".")[0] for name in heads})
        tensors |= {ROOT + name: compiled.plan.captured.frozen(name) for name in heads}
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
    own = {"prompt_embeddings": tensors.pop("prompt_embeddings", torch.zeros(0))}
    base = dict(model.named_parameters())
    learned = {key.removeprefix(ROOT): tensor for key, tensor in tensors.items()}
    name, settings, state = next(
        (cls.name, *found) for cls in methods().values() if (found := cls.from_peft(config, "", own))
    )
    if odd := [key for key, tensor in learned.items() if key not in base or base[key].shape != tensor.shape]:
        raise PeftcError(BadArtifact(folder=str(folder), reason=f"its {odd[0]} is no parameter of the model"))
    learned = {key: tensor for key, tensor in learned.items() if not torch.equal(base[key].cpu(), tensor)}

    def everything(plan: Plan) -> dict[str, Tensor]:
        (binding,) = plan.bindings
        return learned | {binding.names[tensor]: value for tensor, value in state.items()}

    return [applied(name, settings), *map(trained, learned)], everything
