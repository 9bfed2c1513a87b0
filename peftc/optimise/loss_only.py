"""The graph of a training step: the loss alone, whose logits then need never exist all at once."""

from __future__ import annotations

from torch import fx

from peftc.capture.convention import Convention
from peftc.optimise.fuse import Fired, fuse, fusions


def training_entry(module: fx.GraphModule, graph: fx.Graph, convention: Convention) -> tuple[fx.Graph | None, Fired]:
    """`graph` with None for its logits and the rules of a training step applied, and how often they fired.

    None where they did not: then the logits cost nothing more than they do anyway. None, too, where two passes of a
    step are compared by their logits.
    """
    (rule,) = (rule for rule in fusions() if rule.in_training)
    if convention.keys[:1] != ["loss"] or convention.consistency or not convention.logits:
        return None, Fired(rule.name, 0, 0, None)
    copied = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    leaves = copied.graph_copy(graph, known)
    assert isinstance(leaves, tuple)
    for old, new in known.items():
        new.meta = dict(old.meta)
    copied.output(tuple(None if place in convention.logits else leaf for place, leaf in enumerate(leaves)))
    (fired,) = fuse(module, copied, rules=[rule])
    copied.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return (copied if fired.count else None), fired
