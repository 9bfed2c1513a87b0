"""Base weights that are unfrozen by hand, after the compile: `compiled.get_parameter(name).requires_grad_(True)`.

They learn as any other: blocks are traced for what learns, and fused operations have their gradients. Here they get
memory of their own, so that the base model stays as it is, and are remembered, so that no file is written without them.
"""

from __future__ import annotations

import weakref

import torch
from torch import nn

from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.ir import get_attribute
from peftc.planning.plan import Plan
from peftc.rewrite.state import rewritten
from peftc.runtime.errors import CannotUnfreeze, FixedPrecision, NotInSpec


class Watch:
    """The parameters of a compiled model as it was made: which are the base model's, and in what precision.

    `unfrozen` are the names of those that may differ from the base model's although the plan does not train them.
    """

    def __init__(self, module: nn.Module, base: nn.Module, plan: Plan) -> None:
        named = dict(module.named_parameters())
        planned = plan.added
        every = module.named_parameters(remove_duplicate=False)
        own = {id(parameter) for name, parameter in every if name in planned}
        self.base = base
        self.dtypes = {name: parameter.dtype for name, parameter in named.items()}
        self.frozen = {name for name, parameter in named.items() if id(parameter) not in own}
        self.rewritten = self.dtypes.keys() & rewritten(plan)  # what a storage packs is no parameter
        self.unfrozen: set[str] = set()
        # Weak: who shards a model puts others in their place, and these are to be freed.
        self._known = {name: weakref.ref(parameter) for name, parameter in named.items()}

    def look(self, module: nn.Module) -> None:
        """Notices, before a step, what was unfrozen since the last one.

        Raises:
            PeftcError: `fixed-precision` where a parameter was cast, `cannot-unfreeze` where one has a gradient that
                would be lost.
        """
        learning = torch.is_grad_enabled()
        for name, known in self._known.items():
            parameter = known()
            if parameter is None:
                continue
            if parameter.dtype is not self.dtypes[name]:
                raise PeftcError(precision(name, self.dtypes[name], parameter.dtype))
        if learning:
            self.notice(module)
        for name in self.rewritten if learning else ():
            if get_attribute(module, name).requires_grad:
                raise PeftcError(CannotUnfreeze(weight=name))

    def notice(self, module: nn.Module) -> None:
        """Parts what was unfrozen since the last time from the base model."""
        for name in self.frozen - self.unfrozen:
            parameter = self._known[name]()
            if parameter is None or not parameter.requires_grad:
                continue
            if get_attribute(module, name) is parameter:  # not so in `functional_call`
                self.part(module, name)

    def part(self, module: nn.Module, name: str) -> None:
        """Gives a parameter, which stays the same object, memory of its own."""
        parameter = module.get_parameter(name)
        base = dict(self.base.named_parameters(remove_duplicate=False)).get(name)
        if base is not None and parameter.data_ptr() == base.data_ptr():
            parameter.data = parameter.data.clone()
        if name not in self.rewritten:
            self.unfrozen.add(name)

    def unplanned(self, module: nn.Module) -> set[str]:
        """The base model's tensors that learn, or learnt, although the plan does not say so; tied ones by all names."""
        mine = {
            id(parameter)
            for name, parameter in module.named_parameters()
            if name in self.unfrozen or (name in self.frozen and parameter.requires_grad)
        }
        return {name for name, tensor in module.named_parameters(remove_duplicate=False) if id(tensor) in mine}

    def refuse_unplanned(self, module: nn.Module) -> None:
        """Raises PeftcError `not-in-spec` where an artifact would be without something that learnt."""
        if names := sorted(self.unplanned(module)):
            raise PeftcError(NotInSpec(weights=tuple(names)))


def precision(name: str, captured: torch.dtype, asked: torch.dtype) -> FixedPrecision:
    """The diagnostic of a cast."""
    short = (str(dtype).removeprefix("torch.") for dtype in (captured, asked))
    return FixedPrecision(tensor=name, captured=next(short), asked=next(short))
