"""NEFTune (Jain et al. 2023, arXiv:2310.05914): noise on the token embeddings of a training step.

transformers adds it by a hook on the module that looks tokens up, and here that is a part of the graph. So a stand-in
takes the hook: with one, a training step looks its tokens up outside and runs the graph for `inputs_embeds`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, cast

from torch import Tensor, nn
from transformers.integrations.neftune import neftune_post_forward_hook

from peftc.capture.texts import POSITIONS
from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.ir import tensors
from peftc.runtime.errors import NoNoise, OnlyOnTheBase, OnTheBase
from peftc.runtime.holder import Holder

TOKENS, EMBEDDED = "input_ids", "inputs_embeds"
NAME = "get_input_embeddings"
_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
          "_forward_pre_hooks_with_kwargs")  # fmt: skip


class Embeddings:
    """Looks tokens up as a compiled model does, with the hook of NEFTune where there is one."""

    def __init__(self, compiled: Holder) -> None:
        """Of a model that looks its tokens up in one module, which the spec leaves as it is.

        Raises:
            PeftcError: `on-the-base` for another; as an AttributeError.
        """
        found = getattr(compiled.base, NAME)()
        paths = [path for path, module in compiled.base.named_modules() if module is found]
        refused = OnlyOnTheBase(OnTheBase(model=compiled.plan.sites.model, name=NAME))
        if not paths or not isinstance(found, nn.Module) or TOKENS not in compiled.convention.inputs:
            raise refused
        own = {f"{paths[0]}.{name}" for name, _ in found.named_parameters()}
        changed = {name for binding in compiled.plan.bindings for name in binding.site.parameters}
        if own & (changed | {*compiled.plan.trained, *compiled.plan.packed}) or compiled.plan.tasks:
            raise refused
        self.compiled = compiled
        self.path = paths[0]
        self.module = _stand_in(found)

    def look_up(self, given: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a call by name, tokens looked up where noise is to be added.

        Raises:
            PeftcError: `no-noise` where positions are given.
        """
        compiled, module = self.compiled, self.module
        if not compiled.training or not module._forward_hooks or not isinstance(given.get(TOKENS), Tensor):
            return given
        if given.get(POSITIONS) is not None:
            raise PeftcError(NoNoise())
        there = tensors(compiled)
        for name in module._parameters:
            module._parameters[name] = cast(nn.Parameter, there.get(f"{self.path}.{name}"))
        module.training = True
        rest = dict(given)
        return {EMBEDDED: module(rest.pop(TOKENS)), **rest}


def _stand_in(found: nn.Module) -> nn.Module:
    """The same module over the same tensors, with hooks of its own, of which there may be NEFTune's alone."""
    module = copy.copy(found)
    for name in _HOOKS:
        module.__dict__[name] = OrderedDict()
    for name in ("_parameters", "_buffers"):
        module.__dict__[name] = dict(module.__dict__[name])
    register = module.register_forward_hook

    def only_noise(hook: Any, **given: Any) -> Any:
        if hook is not neftune_post_forward_hook:
            raise PeftcError(OnTheBase(model=type(found).__name__, name="register_forward_hook"))
        return register(hook, **given)

    module.__dict__["register_forward_hook"] = only_noise
    return module
