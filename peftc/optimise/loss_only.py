"""The graph of a training step: the loss alone, whose logits then need never exist all at once."""

from __future__ import annotations

from torch import fx

from peftc.capture.convention import Convention
from peftc.graph.ir import copied, drop_unread
from peftc.optimise.fuse import Fired, fuse
from peftc.protocol.rule import fusions


def training_entry(
    module: fx.GraphModule, graph: fx.Graph, convention: Convention
) -> tuple[fx.Graph | None, tuple[Fired, ...]]:
    """`graph` with None for its logits and the rules of a training step applied, and how often each fired.

    None where none did: then the logits cost nothing more than they do anyway. None, too, where two passes of a step
    are compared by their logits.
    """
    rules = [rule for rule in fusions() if rule.in_training]
    if not convention.has_loss or convention.consistency or not convention.logits:
        return None, tuple(Fired(rule.name, 0, 0, None) for rule in rules)
    alone, _ = copied(graph)
    output = alone.output_node()
    leaves = output.args[0]
    assert isinstance(leaves, tuple)
    output.args = (tuple(None if place in convention.logits else leaf for place, leaf in enumerate(leaves)),)
    fired = fuse(module, alone, rules=rules)
    drop_unread(alone)
    return (alone if any(one.count for one in fired) else None), fired
