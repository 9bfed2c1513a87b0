"""Which layers HF PEFT has adapters for that compute what ours do: it wraps a module where it is called."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from peftc.files.hf_peft.places.experts import misread
from peftc.graph.ir import module_path
from peftc.protocol.site import Experts, Projection

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLVING = {layer.forward for layer in CONVOLUTIONS}


def unfit(base: nn.Module, site: Projection) -> str | None:
    """Why HF PEFT, which wraps a layer or a module's parameter where it is called, cannot adapt `site`; or None."""
    if isinstance(site, Experts):
        if "." not in site.name:
            return f"it adapts no parameter of the model itself, as {site.name} is"
        return misread(base, site)
    if site.within:
        return f"it adapts modules where they are called, and what calls {site.name} runs its own code"
    if any(module_path(use.op) != site.path for use in site.uses):
        return f"it adapts modules where they are called, and another part of the model reads the weight of {site.name}"
    module = base.get_submodule(site.path)
    if isinstance(module, CONVOLUTIONS):
        own = type(module).forward not in CONVOLVING or module._forward_hooks or module._forward_pre_hooks
        odd = f"pads with {module.padding_mode}" if module.padding_mode != "zeros" else own and "runs its own code"
        return f"it convolves as torch's layers do, with zeros around, and {site.name} {odd}" if odd else None
    if isinstance(module, nn.Embedding):
        return _odd_table(module, site.name)
    if site.name != site.path or not isinstance(module, nn.Linear | Conv1D):
        return f"it adapts nn.Linear and Conv1D, and {site.name} is a {type(module).__name__}"
    return None if _is_plain(module) else f"it adapts whole modules, and {site.name} does more than a linear layer"


def _odd_table(module: nn.Embedding, name: str) -> str | None:
    """Why HF PEFT, which looks rows up and multiplies them by `embed_scale`, does else than an embedding; or None."""
    own = type(module).forward is not nn.Embedding.forward and getattr(module, "embed_scale", None) is None
    if own or module._forward_hooks or module._forward_pre_hooks:
        return f"it adapts embeddings that look rows up, and {name} runs its own code"
    return None


def _is_plain(module: nn.Linear | Conv1D) -> bool:
    """Whether a linear layer computes x Wᵀ + b and nothing else, as seen from outside, hooks and all."""
    forward = type(module).forward
    if forward in (nn.Linear.forward, Conv1D.forward) and not module._forward_hooks and not module._forward_pre_hooks:
        return True
    try:
        return _computes_a_line(_with_numbers(module))
    except Exception:  # whatever its own code wants of its input, it is more than that
        return False


def _computes_a_line(module: nn.Linear | Conv1D) -> bool:
    weight = module.weight.detach().t() if isinstance(module, Conv1D) else module.weight.detach()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[1], generator=generator).to(weight)
    with torch.no_grad():
        return torch.allclose(module(x), linear(x, weight, module.bias), rtol=1e-4, atol=1e-5)


def _with_numbers(module: nn.Linear | Conv1D) -> nn.Linear | Conv1D:
    """The module, or, where its weight was left in the checkpoint, one that is like it, of other numbers."""
    if not module.weight.is_meta:
        return module
    twin = copy.deepcopy(module).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return twin
