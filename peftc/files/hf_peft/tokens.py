"""HF PEFT's folders in which rows of the token table learn: one tensor, and which rows they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftc.diagnostics.diagnostic import PeftcError
from peftc.files.errors import BadArtifact, CannotExport
from peftc.files.hf_peft.modules import PREFIX
from peftc.files.hf_peft.names import Names
from peftc.files.hf_peft.spec import applied, of_kind
from peftc.graph.ir import get_attribute
from peftc.language import Statement
from peftc.planning.plan import Plan
from peftc.runtime.module import Runtime

KIND = "TRAINABLE_TOKENS"
ROLE = "vocabulary"
INDICES = "token_indices"


def has_tokens(compiled: Runtime) -> bool:
    """Whether the model's method is this one."""
    return any(binding.method.peft_type == KIND for binding in compiled.plan.bindings)


def tokens_folder(compiled: Runtime) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors of a model in which rows of one table learn.

    Raises:
        PeftcError: `cannot-export` where HF PEFT would let others learn, or rows of other tables.
    """
    first, *others = compiled.plan.bindings
    (table,) = first.site.parameters
    there = [site.name for site in compiled.plan.sites if ROLE in site.roles and site.parameters == (table,)]
    reason = None
    if {binding.site.name for binding in (first, *others)} != {*there} or any(b.statement for b in others):
        reason = "all that reads a table reads the rows there"
    modules = _modules(compiled.base, table)
    if len(modules) != 1:
        reason = f"it takes the place of one embedding, and {len(modules)} modules look into {table}"
    if reason:
        raise PeftcError(CannotExport(reason=reason, span=first.span))
    state = {name: get_attribute(compiled, full).detach() for name, full in first.names.items()}
    settings, tensors = first.method.to_peft(first.site, state)
    settings |= {
        "target_modules": modules, "inference_mode": True, "task_type": None,
        "base_model_name_or_path": getattr(compiled.config, "_name_or_path", None) or None,
    }  # fmt: skip
    places = [modules[0], *(b.site.path for b in others)]  # a tied head has a copy of its own there
    return settings, {f"{PREFIX}{place}.{name}": rows.clone() for place in places for name, rows in tensors.items()}


def _modules(base: nn.Module, table: str) -> list[str]:
    """The embeddings that have the table, under every name."""
    weight = dict(base.named_parameters(remove_duplicate=False))[table]
    modules = base.named_modules(remove_duplicate=False)
    return [name for name, module in modules if isinstance(module, nn.Embedding) and module.weight is weight]


def chosen_by(config: dict[str, Any]) -> Statement:
    """The statement that the settings of a folder mean."""
    (cls,) = of_kind(KIND)
    return applied(cls.name, {"ids": ", ".join(map(str, sorted(config.get(INDICES) or [])))}, role=ROLE)


def read_tokens(
    model: nn.Module, bad: Callable[..., BadArtifact], config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[list[Statement], Callable[[Plan], dict[str, Tensor]]]:
    """The statement, and what makes the state, of a folder in which rows of the token table learn.

    Raises:
        PeftcError: `bad-artifact` where they are of another table, or not as many as the settings say.
    """
    if config.get("target_modules") is None:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        chosen = [name for name, module in model.named_modules() if module is embeddings]
    else:
        chosen = sorted(Names(model, config).modules())
    embedding = model.get_submodule(chosen[0]) if len(chosen) == 1 else None
    if not isinstance(embedding, nn.Embedding):
        raise PeftcError(bad(reason=f"its target_modules choose {', '.join(chosen) or 'nothing'}, not one embedding"))
    weight = embedding.weight
    (cls,) = of_kind(KIND)
    (own,) = cls.peft_tensors
    ids, key = config.get(INDICES) or [], f"{PREFIX}{chosen[0]}.{own}"
    if key not in tensors:
        raise PeftcError(bad(reason=f"it has no {key}, which its target_modules choose"))
    modules = dict(model.named_modules(remove_duplicate=False))
    for other in tensors.keys() - {key}:  # a tied head has a copy of its own
        tied = modules.get(other.removeprefix(PREFIX).removesuffix(f".{own}"))
        if getattr(tied, "weight", None) is not weight or not torch.equal(tensors[other], tensors[key]):
            raise PeftcError(bad(reason=f"its {other} is not that of the embedding, and peftc has one for all"))
    if tensors[key].shape != (len(ids), weight.shape[1]):
        shape = tuple(tensors[key].shape)
        raise PeftcError(bad(reason=f"its {key} is {shape}, where its {INDICES} are {len(ids)}"))
    order = sorted(range(len(ids)), key=ids.__getitem__)

    def state(plan: Plan) -> dict[str, Tensor]:
        base = dict(model.named_parameters(remove_duplicate=False))
        for binding in plan.bindings:
            if base[binding.site.parameters[0]] is not weight:
                raise PeftcError(bad(reason=f"{chosen[0]} is not the table that {binding.site.name} reads"))
        names, rows = plan.bindings[0].names, [ids[place] for place in order]
        found = {
            "learned": tensors[key][order], "before": weight.detach().cpu()[rows], "ids": torch.tensor(rows),
        }  # fmt: skip
        return {names[name]: tensor for name, tensor in found.items()}

    return [chosen_by(config)], state
