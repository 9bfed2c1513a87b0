"""What methods add to linear layers, as one low-rank change of each layer's whole weight.

An adapter of either runtime holds A [r, n_in] and B [n_out, r] for a layer, and adds s B A x to its output. Where
several statements act on one layer, or one acts on a part of a fused layer, the rows of all A lie above one another and
the columns of all B side by side, zero outside of their part.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from peftc.diagnostics.source import Span
from peftc.files.hf_peft.places.experts import A, B
from peftc.graph.ir import get_attribute
from peftc.planning.plan import Binding
from peftc.protocol.method import LowRank
from peftc.protocol.site import Experts, Linear
from peftc.runtime.module import Runtime

HF_LORA = "LORA"


@dataclass(frozen=True)
class Change:
    """scale B A, all that is added to a layer's weight W [n_out, n_in]: A [r, n_in], B [n_out, r], both fp32.

    `parameter` is the weight's name in the base model; the base keeps it as [n_in, n_out] where it is `transposed`.
    """

    parameter: str
    a: Tensor
    b: Tensor
    scale: float
    transposed: bool
    span: Span

    @property
    def module(self) -> str:
        """The layer's name in the base model."""
        return self.parameter.rpartition(".")[0]

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Unfit:
    """A statement of which an adapter of low-rank branches cannot hold all, and why."""

    reason: str
    span: Span


def changes_of(compiled: Runtime) -> tuple[list[Change], list[Unfit]]:
    """Every layer's change, in the model's order, and the statements that are none, each once.

    Raises:
        PeftcError: `not-in-spec` where something learns that the spec does not say.
    """
    compiled.watch.refuse_unplanned(compiled)
    plan = compiled.plan
    unfit: dict[object, Unfit] = {}
    found: dict[str, list[tuple[Binding, LowRank]]] = defaultdict(list)
    for binding in plan.bindings:
        if (reason := _reason(binding)) is not None:
            unfit.setdefault(binding.statement, Unfit(reason, binding.span))
        elif isinstance(binding.site, Linear):
            found[binding.site.owner].append((binding, _branch(compiled, binding)))
    for span in plan.trained.values():
        unfit.setdefault(span, Unfit("an adapter has no place for weights of the base model that learn", span))
    return [_together(compiled, name, parts) for name, parts in found.items()], list(unfit.values())


def _reason(binding: Binding) -> str | None:
    """Why what a method does at a site is no branch that an adapter holds, or None."""
    method, site = binding.method, binding.site
    if isinstance(site, Experts):
        return f"an adapter has no place for the stacked experts of {site.name}"
    states = {name: torch.empty(spec.shape, device="meta") for name, spec in binding.state.items()}
    if not isinstance(site, Linear) or method.low_rank(site, states) is None:
        return f"{method.name} is more than a low-rank change of linear layers"
    if site.tied or site.mixed:
        return f"{site.name} shares its weight with another layer, which would be changed, too"
    if method.prepares:  # the frozen weight is another than the base's: what it lacks has to be in the branch
        return method.unexportable(site) if method.peft_type == HF_LORA else f"{method.name} changes the frozen weight"
    return None


def _branch(compiled: Runtime, binding: Binding) -> LowRank:
    """The branch beside the base model's own weight."""
    state = {name: get_attribute(compiled, full).detach() for name, full in binding.names.items()}
    if binding.method.prepares:
        settings, tensors = binding.method.to_peft(binding.site, state)
        r, alpha = settings["r"], settings["lora_alpha"]
        return LowRank(tensors[A], tensors[B], alpha / (math.sqrt(r) if settings["use_rslora"] else r))
    found = binding.method.low_rank(binding.site, state)
    assert found is not None
    return found


def _together(compiled: Runtime, parameter: str, parts: list[tuple[Binding, LowRank]]) -> Change:
    first = parts[0][0].site
    assert isinstance(first, Linear)
    n_out = get_attribute(compiled.base, parameter).shape[1 if first.transposed else 0]
    scale = parts[0][1].scale
    columns = []
    for binding, branch in parts:
        site = binding.site
        assert isinstance(site, Linear)
        b = branch.b.float().cpu() * (1.0 if branch.scale == scale else branch.scale / scale)
        whole = b if site.rows is None else torch.zeros(n_out, b.shape[1])
        if site.rows is not None:
            whole[list(site.rows)] = b
        columns.append(whole)
    a = torch.cat([branch.a.float().cpu() for _, branch in parts])
    return Change(parameter, a, torch.cat(columns, 1), scale, first.transposed, parts[0][0].span)
