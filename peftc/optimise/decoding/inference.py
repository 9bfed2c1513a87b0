"""A graph as it is where nothing is trained: no dropout, and nothing asks whether it is."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch._functorch.compile_utils import fx_graph_cse

from peftc.graph.ir import drop_unread
from peftc.graph.normalise import DROPOUTS

ARITHMETIC = {operator.mul, operator.add, operator.sub}


def for_inference(graph: fx.Graph) -> None:
    """Answers `training` with no, in place, and leaves out what that makes of no effect."""
    known: dict[fx.Node, Any] = dict.fromkeys(graph.find_nodes(op="get_attr", target="training"), False)
    for node in graph.nodes:
        if known and not known.keys().isdisjoint(node.all_input_nodes):
            node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda given: known.get(given, given))
            if node.target in ARITHMETIC and not node.all_input_nodes:
                known[node] = node.target(*node.args)
    for node in list(graph.nodes):
        if node.target in DROPOUTS and node.args[2] is False:
            node.replace_all_uses_with(node.args[0])
    drop_unread(graph)


def computed_once(graph: fx.Graph) -> fx.Graph:
    """The graph with one node for what several compute alike, as each layer does of the positions."""
    found: fx.Graph = fx_graph_cse(graph)
    return found
