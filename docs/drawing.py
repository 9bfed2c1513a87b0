"""A block of a small Llama before and after each method, as the page that `peftc show --html` makes of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

from generated import statement
from peftc.capture.capture import Captured, capture
from peftc.capture.inputs import example_inputs
from peftc.diagnostics.timings import Timings
from peftc.driver.passes import PASSES
from peftc.driver.pipeline import Graphs, graphs
from peftc.graph.ir import set_tensor, tensors
from peftc.planning.planner import make_plan
from peftc.protocol.method import methods
from peftc.roles.assign import find_sites
from peftc.show.formats import render_show
from peftc.spec.check import intend
from peftc.spec.resolve import Intentions


@cache
def drawings() -> dict[str, str]:
    """By method, with its default statement; none of a method that starts from data, which a drawing has not."""
    found = {}
    for name, cls in methods().items():
        intentions = intend(statement(cls))
        if all(application.method.data is None for application in intentions.applications):
            found[name] = drawn(intentions)
    return found


def drawn(intentions: Intentions) -> str:
    """The first block, as it was captured and as the method leaves it: what is fused is no longer told apart."""
    captured = own_copy()
    shown = graphs(make_plan(captured, find_sites(captured), intentions), PASSES[:-1], Timings())
    (before, first), *_, (after, last) = shown.history.items()
    block = next(iter(shown.plan.sites.blocks))
    return render_show(Graphs(shown.plan, {before: first, after: last}), block=block, format="html")


def own_copy() -> Captured:
    """What was captured once, with a graph that passes may use up."""
    known = small()
    graph = fx.Graph()
    graph.output(graph.graph_copy(known.module.graph, {}))
    module = fx.GraphModule(known.module, graph, class_name="LlamaForCausalLM")
    for name, tensor in tensors(known.module).items():
        set_tensor(module, name, tensor)
    return replace(known, module=module)


@cache
def small() -> Captured:
    """One layer, whose sizes every method's defaults divide."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    return capture(model, example_inputs(model, None))
