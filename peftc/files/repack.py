"""A merged model whose quantised weights are packed again, and what that loses of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from peftc.capture.checkpoints.bitsandbytes import PackedFile
from peftc.files.merge import check_finite, merge, write
from peftc.graph.ir import get_attribute
from peftc.planning.packed_weight import PackedWeight
from peftc.protocol.site import Projection
from peftc.runtime.module import Runtime


@dataclass(frozen=True, slots=True)
class Rounding:
    """What a merged weight M loses when it is packed again, to Q: max |M - Q|, and ‖M - Q‖ / ‖M‖ (Frobenius)."""

    largest: float
    relative: float


@dataclass(frozen=True)
class Repacked:
    """A merged model, with the numbers that its packed weights stand for, and what each of these lost.

    `packing`: how a checkpoint says them in few bits; None where bitsandbytes has no layers for that.
    """

    model: nn.Module
    lost: dict[str, Rounding]
    packing: PackedFile | None


def repack(compiled: Runtime) -> Repacked:
    """`merge`, with each weight that is packed in `compiled` rounded to its storage's numbers again.

    The model has the rounded weights in the base's own precision: packing them once more changes little or nothing. A
    weight that no method changes stays packed as it is.

    Raises:
        PeftcError: as `merge`.
    """
    model = merge(compiled)
    lost: dict[str, Rounding] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    settings = _settings(compiled, model)
    changed = {binding.site.weight for binding in compiled.plan.bindings if isinstance(binding.site, Projection)}
    with torch.no_grad():
        for name, item in compiled.plan.packed.items():
            merged = get_attribute(model, name).detach()
            as_it_is = {full: get_attribute(compiled, full) for full in item.buffers}
            buffers = item.pack(merged) if name in changed else as_it_is
            rounded = item.unpack(buffers)
            lost[name] = _lost(merged, rounded)
            if (state := item.to_bitsandbytes(buffers)) is not None:
                layers[name.removesuffix(".weight")] = state
            write(compiled, model, name, rounded)
        check_finite(compiled, {name: get_attribute(model, name) for name in compiled.plan.packed})
    return Repacked(model, lost, None if settings is None else PackedFile(layers, settings))


def _lost(merged: Tensor, rounded: Tensor) -> Rounding:
    difference, norm = merged.float() - rounded.float(), float(merged.float().norm())
    return Rounding(float(difference.abs().max()), float(difference.norm()) / norm if norm else 0.0)


def _settings(compiled: Runtime, model: nn.Module) -> dict[str, object] | None:
    """`quantization_config` of a checkpoint with these layers packed and no others; None if there cannot be one.

    As where bitsandbytes does not have the storage of one of them, or packs all of a model's layers in one way.
    """
    packed = compiled.plan.packed
    if not packed or not isinstance(model, PreTrainedModel):
        return None
    first, *others = [item.storage.bitsandbytes_settings(item.dtype) for item in packed.values()]
    if first is None or any(other != first for other in others):
        return None
    if not all(_is_layer(model, item) for item in packed.values()):
        return None
    skipped = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and f"{name}.weight" not in packed
    ]  # fmt: skip
    # A layer is left dense that is like one of these by name, or is one that the model keeps in full precision.
    dense = [*skipped, *(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    if not all(should_convert_module(name.removesuffix(".weight"), dense) for name in packed):
        return None
    return {"quant_method": "bitsandbytes", **first, "llm_int8_skip_modules": skipped}


def _is_layer(model: PreTrainedModel, item: PackedWeight) -> bool:
    """Whether the weight is that of a layer that transformers has bitsandbytes' in place of."""
    owner, _, leaf = item.weight.rpartition(".")
    return leaf == "weight" and type(model.get_submodule(owner)) in (nn.Linear, Conv1D)
