"""What methods add to the loss in training: DiffPruning's L0 norm, AdaLoRA's orthogonality.

Each site's penalty is computed beside the site, so that it folds into the site's block, and the sum joins the loss
where the graph returns it.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from peftc.capture.convention import loss_node
from peftc.graph.ir import Provenance, trace, value
from peftc.planning.plan import Binding, Plan
from peftc.protocol.method import Method
from peftc.rewrite.splicer import Splicer, of_method


def penalised(plan: Plan) -> list[Binding]:
    """The bindings whose methods have a penalty."""
    return [binding for binding in plan.bindings if type(binding.method).penalty is not Method.penalty]


def add_penalties(splicer: Splicer, plan: Plan, pass_name: str) -> bool:
    """Adds every penalty to the loss of the graph, times `self.training`. Returns whether there was any."""
    graph = splicer.graph
    loss = loss_node(graph, plan.captured.result)
    bindings = penalised(plan)
    if loss is None or not bindings:
        return False
    found = [_penalty(splicer, binding, pass_name) for binding in bindings]

    def function(loss: Tensor, training: Tensor, *penalties: Tensor) -> Tensor:
        return loss + training * torch.stack(penalties).sum().to(loss.dtype)

    args = [loss, splicer.training(), *found]
    output = graph.output_node()
    stamp = Provenance(pass_name, "loss", bindings[0].span)
    result, _ = splicer.splice(trace(function, *map(value, args)), args, output.prev, stamp)
    output.replace_input_with(loss, result)
    return True


def _penalty(splicer: Splicer, binding: Binding, pass_name: str) -> fx.Node:
    """The nodes of one site's penalty, behind a reader of its state: in the block that the site is in."""
    method, site, names = binding.method, binding.site, tuple(binding.names)
    nodes = [splicer.operand(full) for full in binding.names.values()]

    def function(*given: Tensor) -> Tensor:
        return method.penalty(site, dict(zip(names, given, strict=True)))

    facts = "penalty", of_method(method, site, names)
    template = splicer.templates.get(function, facts, [value(node) for node in nodes])
    reader = next((user for node in nodes for user in node.users), nodes[-1])
    result: fx.Node = splicer.splice(template, nodes, reader, Provenance(pass_name, site.name, binding.span))[0]
    return result
