"""HF PEFT's folders of LayerNorm tuning: the norms themselves learn, which is `train norm` here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from peftc.diagnostics.diagnostic import PeftcError
from peftc.files.errors import BadArtifact, CannotExport
from peftc.files.hf_peft.kinds import about
from peftc.files.hf_peft.modules import PREFIX
from peftc.files.hf_peft.names import Names, saying
from peftc.files.hf_peft.spec import trained
from peftc.graph.ir import get_attribute
from peftc.language import Statement
from peftc.planning.plan import Plan
from peftc.runtime.module import Runtime

NORMS = "LN_TUNING"
COPY = ".ln_tuning_layers."  # between a module's name and a parameter's: theirs learns in a copy of the module


def has_norms(compiled: Runtime) -> bool:
    """Whether all that learns is parameters of the base model."""
    return bool(compiled.plan.trained) and not compiled.plan.bindings


def norms_folder(compiled: Runtime) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and tensors of a model in which only whole norms learn.

    Raises:
        PeftcError: `cannot-export` where anything else does.
    """
    learning = compiled.plan.trained
    modules = sorted({name.rpartition(".")[0] for name in learning})
    tensors: dict[str, Tensor] = {}
    for module in modules:
        for name, parameter in compiled.base.get_submodule(module).named_parameters():
            full = f"{module}.{name}"
            if not module or full not in learning or parameter.dim() != 1:
                span = next(span for name, span in learning.items() if name.rpartition(".")[0] == module)
                whole = "of the base model's parameters it holds whole norms alone"
                reason = whole if parameter.dim() != 1 else f"all of {module} learns there"
                raise PeftcError(CannotExport(reason=reason, span=span))
            tensors[f"{PREFIX}{module}{COPY}{name}"] = get_attribute(compiled, full).detach()
    settings = {"peft_type": NORMS, "target_modules": saying(compiled.base, modules)}
    return settings | about(compiled, told=False), tensors


def read_norms(
    model: nn.Module, bad: Callable[..., BadArtifact], config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[list[Statement], Callable[[Plan], dict[str, Tensor]]]:
    """The statements, and what makes the state, of a folder in which norms learn.

    Raises:
        PeftcError: `bad-artifact` where a tensor has no place, or a module that is meant no tensors.
    """
    parameters, modules = dict(model.named_parameters()), Names(model, config).modules()
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, name = key.removeprefix(PREFIX).partition(COPY)
        full = f"{module}.{name}"
        if not key.startswith(PREFIX) or module not in modules or full not in parameters:
            raise PeftcError(bad(reason=f"its {key} belongs to nothing that its target_modules choose"))
        if parameters[full].shape != tensor.shape:
            shape = tuple(parameters[full].shape)
            raise PeftcError(bad(reason=f"its {key} is {tuple(tensor.shape)}, where the model has {shape}"))
        found[full] = tensor
    wanted = {f"{module}.{name}" for module in modules for name, _ in model.get_submodule(module).named_parameters()}
    if absent := sorted(wanted - found.keys()):
        raise PeftcError(bad(reason=f"it has no {absent[0]}, which its target_modules choose"))
    return [trained(name) for name in found], lambda plan: found
