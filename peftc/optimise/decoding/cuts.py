"""The programs that a captured call with a cache is made of.

A text model is one program, for a whole prompt as for one more token. Of a model with an encoder it is three, cut
from one graph: what encodes, what begins a text, and what goes on with it, which takes as given what the cross
attentions keep of the encoder's result. Where something stands in front of the text, it is put there when the text
begins, and what goes on is another graph, without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from peftc.capture.cached import ENCODED, LOGITS, Cached
from peftc.graph.ir import PROVENANCE
from peftc.optimise.decoding.attention import drop_whole_slices, share_keys
from peftc.optimise.decoding.branches import dora_products, fewer_branches
from peftc.optimise.decoding.branches import products as products_beside
from peftc.optimise.decoding.by_row import fewer_by_row
from peftc.optimise.decoding.by_row import products as products_by_row
from peftc.optimise.decoding.elementwise import fewer_operations
from peftc.optimise.decoding.inference import computed_once, for_inference
from peftc.optimise.decoding.packed import keep_eight_bits, keep_four_bits
from peftc.optimise.decoding.program import Program, cut, program
from peftc.optimise.decoding.room import grow_in_place
from peftc.optimise.decoding.rotary import turn_at_once
from peftc.optimise.decoding.spelling import respell

aten = torch.ops.aten


TAKE_PACKED = (products_beside, dora_products, products_by_row)

# What makes a step of few tokens shorter, each in place.
SHORTER = (
    drop_whole_slices, share_keys, turn_at_once, fewer_branches, fewer_by_row,
    partial(keep_eight_bits, readers=TAKE_PACKED), partial(keep_four_bits, readers=TAKE_PACKED), fewer_operations,
)  # fmt: skip


@dataclass(frozen=True)
class Programs:
    """What generates text: `begin` with nothing kept yet, or any number of tokens; `go_on` with at least one."""

    begin: Program
    go_on: Program
    encode: Program | None = None


def programs(module: fx.GraphModule, names: tuple[str, ...], cached: Cached, prompts: str) -> Programs:
    """The programs of a graph with all passes run over it.

    Args:
        module: the graph and its tensors.
        names: what the graph returns, in order.
        cached: how it was called.
        prompts: the name of the pass that put something in front, whose cuts of what is kept are no part of these.
    """
    for_inference(module.graph)
    graph = module.graph = computed_once(module.graph)
    for shorten in SHORTER:
        shorten(graph)
    grow_in_place(graph, cached.past)
    on_cpu = all(tensor.device.type == "cpu" for tensor in module.parameters())
    leaves = graph.output_node().args[0]
    assert isinstance(leaves, tuple | list)
    found = {name: leaf if name == LOGITS else _whole(leaf, prompts) for name, leaf in zip(names, leaves, strict=True)}
    text = {name: found[name] for name in (LOGITS, *cached.past)}
    if not cached.cross:
        whole = _made(module, text, {}, on_cpu)
        return Programs(whole, whole)
    crossed = {name: found[name] for name in cached.crossed}
    encoded = {ENCODED: found[ENCODED]}
    return Programs(
        _made(module, text | crossed, encoded, on_cpu),
        _made(module, text, crossed, on_cpu),
        _made(module, encoded, {}, on_cpu),
    )


def _made(module: fx.GraphModule, outputs: dict[str, fx.Node], given: dict[str, fx.Node], on_cpu: bool) -> Program:
    new = cut(module.graph, outputs, given)
    respell(new, on_cpu=on_cpu)
    return program(module, new, outputs)


def _whole(leaf: fx.Node, prompts: str) -> fx.Node:
    """An output with the positions that were added to it."""
    while leaf.target is aten.slice.Tensor and (stamp := leaf.meta.get(PROVENANCE)) and stamp.pass_name == prompts:
        source = leaf.args[0]
        assert isinstance(source, fx.Node)
        leaf = source
    return leaf
