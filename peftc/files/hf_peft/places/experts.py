"""Stacked experts in HF PEFT's folder: `target_parameters`, whose wrappers are nested in one another.

Of the parameters of one module that are adapted, the one registered first is wrapped first, so it lies deepest:
`experts.base_layer.lora_A.weight` is of the first of two, `experts.lora_A.weight` of the second. A [experts, r, n_in]
is stored as [experts * r, n_in], and B [experts, n_out, r] as [n_out, r * experts].
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from peftc.protocol.site import Experts

WRAPPED = "base_layer"
A, B = "lora_A.weight", "lora_B.weight"


def place(model: nn.Module, parameter: str, adapted: Iterable[str]) -> str:
    """The module name under which HF PEFT keeps what belongs to `parameter`, of all that are `adapted`."""
    module, _, name = parameter.rpartition(".")
    order = _in_order(model, module, adapted)
    return ".".join([module, *[WRAPPED] * (len(order) - 1 - order.index(name))])


def misread(model: nn.Module, site: Experts) -> str | None:
    """Why HF PEFT would take inputs for outputs at `site`, or None: it asks the module, and else guesses."""
    module, _, _ = site.name.rpartition(".")
    if getattr(model.get_submodule(module), "is_transposed", False) == site.transposed:
        return None
    return f"it takes the inputs of {site.name} for its outputs"


def stored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One adapter's tensors as HF PEFT stores them."""
    return {A: tensors[A].flatten(0, 1), B: tensors[B].permute(1, 2, 0).flatten(1)}


def restored(tensors: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """One adapter's tensors from HF PEFT's. Tensors that are no such ones are left as they are."""
    if tensors.keys() != {A, B} or any(tensor.dim() != 2 for tensor in tensors.values()):
        return tensors
    if tensors[A].shape[0] % experts or tensors[B].shape[1] % experts:
        return tensors
    a, b = tensors[A].unflatten(0, (experts, -1)), tensors[B].unflatten(1, (-1, experts)).permute(2, 0, 1)
    return {A: a, B: b}


def _in_order(model: nn.Module, module: str, adapted: Iterable[str]) -> list[str]:
    """The adapted parameters of one module as they are registered."""
    names = {name.removeprefix(f"{module}.") for name in adapted}
    return [name for name, _ in model.get_submodule(module).named_parameters(recurse=False) if name in names]
