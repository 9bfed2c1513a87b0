"""What methods want to see of data before they start: sums over calibration batches, on the frozen model.

Inputs and weights' gradients come from the captured graph before any pass; gradients of a method's own state from a
second compile in which each method is replaced by its `probe()`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from peftc.calling import Convention
from peftc.errors import PeftcError
from peftc.insert import dense_weight
from peftc.ir import get_attribute
from peftc.method import Data
from peftc.model_errors import BadCalibration
from peftc.module import CompiledModule
from peftc.penalties import loss_node
from peftc.planning import Binding, Plan
from peftc.site import Linear

Batches = Iterable[Any]
PROBE_STD = 0.02  # of BERT's initialisation, which SparseAdapter's adapters start from


def observed(plan: Plan, batches: Batches) -> dict[Binding, Any]:
    """What `plan`'s methods want to see of `batches`, except for gradients of their own state.

    Args:
        plan: with its graph as it was captured.
        batches: of inputs, each as the model is called: a mapping, or the arguments of a plain module.

    Raises:
        PeftcError: `bad-calibration` if there are no batches, they do not fit, or the model returns no loss for them.
    """
    wanting: dict[Data, list[Binding]] = defaultdict(list)
    for binding in plan.bindings:
        if binding.method.data is not None:
            wanting[binding.method.data].append(binding)
    module = plan.captured.module
    module.train(False)
    found: dict[Binding, Any] = {}
    if inputs := wanting[Data.INPUTS]:
        found |= _second_moments(module, plan, inputs, batches)
    if weights := wanting[Data.WEIGHT_GRADIENTS]:
        found |= _squared_gradients(module, plan, weights, batches)
    return found


def wants_state_gradients(plan: Plan) -> bool:
    """Whether some method is to be probed."""
    return any(binding.method.data is Data.STATE_GRADIENTS for binding in plan.bindings)


def probing(plan: Plan) -> Plan:
    """`plan` with each method that wants gradients of its state replaced by its probe, and no other method."""
    kept = [binding for binding in plan.bindings if binding.method.data is Data.STATE_GRADIENTS]
    standing = {one.statement: [b.site for b in kept if b.statement == one.statement] for one in kept}
    probes = {one.statement: one.method.probe() for one in kept}
    shared = {number: probes[number].shared(sites) for number, sites in standing.items()}
    bindings = tuple(replace(b, method=probes[b.statement], shared=shared[b.statement]) for b in kept)
    return replace(plan, bindings=bindings, trained={})


def probed(compiled: CompiledModule, batches: Batches) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """w and ∂L/∂w summed over `batches`, by state name, for each binding of a `probing` plan that was built.

    What starts at zero is given small random numbers first: a zero has no gradient to pass on.
    """
    with torch.no_grad():
        for parameter in compiled.trainable_parameters().values():
            if not parameter.any():
                parameter.normal_(std=PROBE_STD)
    compiled.eval()
    plan = compiled.plan
    _has_loss(compiled.history["capture"], plan)
    for given in _given(plan, batches):
        compiled(**given).loss.backward()
    return [
        {
            name: _with_gradient(get_attribute(compiled, full))
            for name, full in binding.names.items()
            if binding.tensors[full].trainable
        }
        for binding in plan.bindings
    ]


def _with_gradient(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """A parameter and its gradient: zeros where the loss does not depend on it."""
    gradient = parameter.grad
    return parameter.detach(), torch.zeros_like(parameter) if gradient is None else gradient


def _second_moments(
    module: fx.GraphModule, plan: Plan, bindings: list[Binding], batches: Batches
) -> dict[Binding, Tensor]:
    """xᵀx over all tokens that the attention mask keeps, in double precision."""
    watched: dict[fx.Node, list[Binding]] = defaultdict(list)
    for binding in bindings:
        assert isinstance(binding.site, Linear)
        for use in binding.site.uses:
            watched[use.x].append(binding)
    sums: dict[fx.Node, Tensor] = {}

    class Watch(fx.Interpreter):
        mask: Tensor | None = None

        def run_node(self, n: fx.Node) -> Any:
            x = super().run_node(n)
            if n in watched:
                kept = x[self.mask] if self.mask is not None and x.shape[:2] == self.mask.shape else x.flatten(0, -2)
                kept = kept.double()
                sums[n] = sums.get(n, 0) + kept.T @ kept
            return x

    watch = Watch(module)
    with torch.no_grad():
        for given in _given(plan, batches):
            mask = given.get("attention_mask")
            watch.mask = None if mask is None else mask.bool()
            watch.run(*given.values())
    found: dict[Binding, Tensor] = {}
    for node, members in watched.items():
        for binding in members:
            found[binding] = found[binding] + sums[node] if binding in found else sums[node]
    return found


def _squared_gradients(
    module: fx.GraphModule, plan: Plan, bindings: list[Binding], batches: Batches
) -> dict[Binding, Tensor]:
    """Σ over examples of (∂L/∂W)², the diagonal of the empirical Fisher information, one example at a time."""
    names = {binding.site.parameters[0] for binding in bindings}
    weights: dict[str, Tensor] = {name: get_attribute(module, name) for name in names}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    _has_loss(module.graph, plan)
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for given in _given(plan, batches):
            for example in _examples(given):
                loss = module(*example.values())[0]
                for name, gradient in zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True):
                    sums[name] += gradient.square()
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    return {
        binding: dense_weight(sums[binding.site.parameters[0]], binding.site)
        for binding in bindings
        if isinstance(binding.site, Linear)
    }


def _examples(given: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    size = len(next(iter(given.values())))
    for row in range(size):
        yield {name: tensor[row : row + 1] for name, tensor in given.items()}


def _has_loss(graph: fx.Graph, plan: Plan) -> None:
    if loss_node(graph, plan) is None:
        raise PeftcError(BadCalibration(reason=f"{plan.sites.model} returns no loss to take gradients of"))


def _given(plan: Plan, batches: Batches) -> Iterator[dict[str, Tensor]]:
    """Each batch as the graph's inputs, by name and in their order."""
    convention = Convention(plan.captured.inputs, plan.captured.result)
    device = next(plan.captured.module.parameters()).device
    empty = True
    for batch in batches:
        empty = False
        args = () if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else (batch,)
        try:
            given = convention.bind(args, dict(batch) if isinstance(batch, Mapping) else {})
        except TypeError as error:
            raise PeftcError(BadCalibration(reason=str(error))) from None
        if len(given) < len(convention.inputs):
            missing = ", ".join(name for name in convention.inputs if name not in given)
            raise PeftcError(BadCalibration(reason=f"a batch has no {missing}"))
        yield {name: tensor.to(device) for name, tensor in given.items()}
    if empty:
        raise PeftcError(BadCalibration(reason="there are no batches"))
