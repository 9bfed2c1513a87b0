"""What methods add to the loss in training: DiffPruning's L0 norm, AdaLoRA's orthogonality.

Each site's penalty is computed beside the site, so that it folds into the site's block, and the sum joins the loss
where the graph returns it.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, fx

from peftc.capture.convention import loss_node
from peftc.graph.ir import Provenance, attribute_node, splice, trace, value
from peftc.graph.normalise import training_tensor
from peftc.planning.plan import Binding, Plan
from peftc.protocol.method import Method


def penalised(plan: Plan) -> list[Binding]:
    """The bindings whose methods have a penalty."""
    return [binding for binding in plan.bindings if type(binding.method).penalty is not Method.penalty]


def add_penalties(module: fx.GraphModule, plan: Plan, pass_name: str) -> bool:
    """Adds every penalty to the loss of the graph, times `self.training`. Returns whether there was any."""
    graph = module.graph
    loss = loss_node(graph, plan.captured.result)
    bindings = penalised(plan)
    if loss is None or not bindings:
        return False
    templates: dict[Hashable, fx.Graph] = {}
    found = [_penalty(module, binding, pass_name, templates) for binding in bindings]

    def function(loss: Tensor, training: Tensor, *penalties: Tensor) -> Tensor:
        return loss + training * torch.stack(penalties).sum().to(loss.dtype)

    args = [loss, training_tensor(graph), *found]
    output = graph.output_node()
    stamp = Provenance(pass_name, "loss", bindings[0].span)
    result, _ = splice(graph, trace(function, *map(value, args)), args, output.prev, stamp)
    output.replace_input_with(loss, result)
    return True


def _penalty(module: fx.GraphModule, binding: Binding, pass_name: str, templates: dict[Hashable, fx.Graph]) -> fx.Node:
    """The nodes of one site's penalty, behind a reader of its state: in the block that the site is in."""
    method, site, names = binding.method, binding.site, tuple(binding.names)
    nodes = [attribute_node(module.graph, module, full) for full in binding.names.values()]

    def function(*given: Tensor) -> Tensor:
        return method.penalty(site, dict(zip(names, given, strict=True)))

    fakes = [value(node) for node in nodes]
    shapes = tuple(f"{tuple(fake.shape)} {fake.dtype} {fake.device}" for fake in fakes)
    key = type(method), repr(method), tuple(site.facts().items()), names, shapes
    if key not in templates:
        templates[key] = trace(function, *fakes)
    reader = next((user for node in nodes for user in node.users), nodes[-1])
    result, _ = splice(module.graph, templates[key], nodes, reader, Provenance(pass_name, site.name, binding.span))
    return result
