"""What autograd keeps between the two passes of a training step, read off a captured graph.

A tensor counts once, however many operations saved it, and only those that a gradient needs. Sizes stay the captured
ones: a plan puts batch and sequence in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from peftc.graph.cut import cheapest, is_dear, may_repeat, weight_of
from peftc.graph.ir import Memory, block_of, is_tensor, memory, value
from peftc.kernels.island import Island
from peftc.planning.memory import Kept
from peftc.planning.plan import Binding
from peftc.protocol.site import Block, Site
from peftc.roles.parameters import CONVOLUTIONS
from peftc.roles.products import GROUPED

aten = torch.ops.aten


# Operations that keep their input, their output, or (by position) operands for the backward. A product keeps an
# operand only where the other one needs a gradient, which `_kept_by` says.
KEEPS_INPUT = {
    aten.gelu.default, aten.silu.default, aten.layer_norm.default, aten.rms_norm.default, aten.pow.Tensor_Scalar,
    aten.group_norm.default, aten.batch_norm.default, aten.erf.default, aten.cos.default, aten.sin.default,
    aten.log.default, aten.hardswish.default, aten.mish.default, aten.softplus.default, aten.abs.default,
}  # fmt: skip
KEEPS_OUTPUT = {
    aten.relu.default, aten.tanh.default, aten.sigmoid.default, aten.softmax.int, aten.exp.default,
    aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default, aten.log_softmax.int,
}  # fmt: skip
PRODUCTS = {
    aten.mul.Tensor: (0, 1), aten.div.Tensor: (0, 1), aten.matmul.default: (0, 1), aten.bmm.default: (0, 1),
    aten.mm.default: (0, 1), aten.linear.default: (0, 1), aten.addmm.default: (1, 2), aten.baddbmm.default: (1, 2),
}  # fmt: skip
ATTENTION = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Piece:
    """What is kept of one block: values of the graph and hidden states as they were, by their memory, and what is none.

    `again`: the nodes that the backward pass computes again.
    """

    values: dict[Memory, Kept]
    replaced: dict[Memory, Kept]
    beside: tuple[Kept, ...]
    again: frozenset[fx.Node]


class Step:
    """One training step over a captured graph: what stands in it, what learns, what is computed again."""

    def __init__(
        self, graph: fx.Graph, blocks: Iterable[str], bindings: Iterable[Binding], trained: Container[str],
        recomputed: Container[str],
    ) -> None:  # fmt: skip
        self.graph = graph
        self.blocks = frozenset(blocks)
        self.bindings = tuple(bindings)
        self.recomputed = recomputed
        self.needs = self._needing_gradients(trained)
        self.of = {node: block_of(node, self.blocks) for node in graph.nodes}
        self.members: dict[str | None, list[fx.Node]] = defaultdict(list)
        for node, block in self.of.items():
            self.members[block].append(node)
        self.by_block: dict[str | None, list[Binding]] = defaultdict(list)
        for binding in self.bindings:
            self.by_block[self._block_of_site(binding.site)].append(binding)

    def kept(self) -> tuple[Kept, ...]:
        """Everything that is kept from the forward pass for the backward pass: each tensor's memory once.

        Of what the backward pass reads in a block, those values that `peftc.graph.cut` keeps.
        """
        pieces = [self.piece(block, again=block in self.recomputed) for block in {**self.members, **self.by_block}]
        values = {where: kept for piece in pieces for where, kept in piece.values.items()}
        replaced = {where: kept for piece in pieces for where, kept in piece.replaced.items()}
        return (*values.values(), *replaced.values(), *(kept for piece in pieces for kept in piece.beside))

    def piece(self, block: str | None, *, again: bool) -> Piece:
        """What is kept of one block, or of what stands in none; `again`: of the block's input all else is computed."""
        needed: dict[fx.Node, None] = {}
        beside: list[Kept] = []
        replaced: dict[Memory, Kept] = {}
        for node in self.members.get(block, ()):
            if node.op != "call_function" or self.needs.isdisjoint(node.all_input_nodes):
                continue
            needed |= dict.fromkeys(tensor for tensor in _kept_by(node, self.needs) if is_tensor(tensor))
            if not again:
                beside += _kept_beside(node)
        bindings = self.by_block.get(block, ())
        for binding in () if again else bindings:
            beside += _kept_by_branch(binding, needed, replaced)
        chosen = set(self._chosen(block, needed, again))
        values = {memory(node): _whole(node) for node in chosen if node.op == "call_function" and is_tensor(node)}
        read = {node for binding in bindings for node in binding.site.reads()} if again else set[fx.Node]()
        return Piece(values, replaced, tuple(beside), frozenset(self._on_the_way(block, read | needed.keys(), again)))

    def _on_the_way(self, block: str | None, wanted: Iterable[fx.Node], again: bool) -> set[fx.Node]:
        """What is computed again in a block for what is wanted; of dropout the mask is kept, and not what it drops."""
        found: set[fx.Node] = set()
        queue = [*wanted] if again else []
        while queue:
            node = queue.pop()
            if node.op == "call_function" and self.of[node] == block and node not in found:
                found.add(node)
                queue += node.all_input_nodes
        return found

    def _needing_gradients(self, trained: Container[str]) -> set[fx.Node]:
        """The nodes a gradient flows through: all that depend on something that learns."""
        starts = {
            node for binding in self.bindings if binding.method.changes(binding.site) for node in binding.site.changes()
        }
        needs: set[fx.Node] = set()
        for node in self.graph.nodes:
            learns = node.op == "get_attr" and str(node.target) in trained
            if learns or node in starts or any(argument in needs for argument in node.all_input_nodes):
                needs.add(node)
        return needs

    def _block_of_site(self, site: Site) -> str | None:
        """The block whose backward pass a branch at the site belongs to; that of a block's own branch is its own."""
        return site.path if isinstance(site, Block) else site.block if site.block in self.blocks else None

    def _chosen(self, block: str | None, wanted: dict[fx.Node, None], all_again: bool) -> Iterable[fx.Node]:
        """What is kept so that the backward pass of a block has what it wants; outside of blocks that is all of it."""
        if block is None:
            return wanted
        members = self.members.get(block, [])
        inside = set(members)
        entering = dict.fromkeys(source for node in members for source in node.all_input_nodes if source not in inside)

        def weight(node: fx.Node) -> float:
            own = node in inside or node in self.needs or self.of[node] is not None
            return weight_of(node, set()) if own else 0  # masks, positions and weights are there anyway

        def again(node: fx.Node) -> bool:
            repeats = node in inside and node.op == "call_function" and may_repeat(node)
            return repeats and (all_again or not is_dear(node))

        return cheapest(
            [*entering, *members], {node for node in wanted if node in inside or node in entering}, weight, again
        )


def _kept_beside(node: fx.Node) -> list[Kept]:
    """What an operation keeps that is no value of the graph: masks, row statistics, log-probabilities."""
    if node.target is aten.dropout.default:
        return [Kept(tuple(value(node).shape), 1)]
    if node.target is ATTENTION:
        return [Kept(tuple(value(node).shape)[:-1], 4)]  # the log of each row's sum
    if node.target is aten.layer_norm.default:
        return [Kept((2, *value(node).shape[:-1]), value(node).element_size())]  # mean and reciprocal deviation
    if node.target is aten.cross_entropy_loss.default:
        return [_whole(node.all_input_nodes[0])]
    return []


def _kept_by_branch(binding: Binding, needed: dict[fx.Node, None], replaced: dict[Memory, Kept]) -> list[Kept]:
    """What an inserted branch keeps: the site's input, which branches share, and each narrow product of it."""
    site = binding.site
    shapes = [state.shape for state in binding.state.values() if state.trainable]
    narrow = binding.method.keeps(site)
    if narrow is None:
        narrow = sum(shape[-2] for shape in shapes if len(shape) > 1 and shape[-2] < shape[-1])
    read = site.reads()
    for node in read:
        # What a block's branch reads is the hidden state as it was, not the sum that goes on.
        if isinstance(site, Block) and node is site.h and binding.method.changes(site):
            replaced[memory(node)] = _whole(node)
        else:
            needed[node] = None
    # At a block all that is read goes into one product after the other; elsewhere each use is a branch of its own.
    branches = read[:1] if isinstance(site, Block) else read
    made = [Kept(site.narrow(x, narrow), _element(x)) for x in branches if narrow]
    dense = binding.method.keeps_dense(site)
    return made + [Kept((dense,), 4) for _ in branches if dense]


def _element(x: fx.Node) -> int:
    """Bytes of a number that a branch makes of x, which learns in fp32 at least; what is looked up by is no number."""
    return max(value(x).element_size(), 4) if value(x).is_floating_point() else 4


def _whole(node: fx.Node) -> Kept:
    """All the memory that a value lies in: of a slice autograd keeps the whole tensor."""
    return Kept((value(node).untyped_storage().nbytes(),), 1)


def _kept_by(node: fx.Node, needs: set[fx.Node]) -> Iterable[fx.Node]:
    operands = [argument if isinstance(argument, fx.Node) else None for argument in node.args]
    if isinstance(node.target, Island):
        return node.args[1]  # type: ignore[return-value]
    if node.target is ATTENTION:
        return [operand for operand in (*operands[:3], node) if operand]
    if node.target in KEEPS_INPUT:
        return node.all_input_nodes[:1]
    if node.target in KEEPS_OUTPUT:
        return [node]
    if (
        str(node.target) in GROUPED or node.target in CONVOLUTIONS
    ):  # one autograd function, which keeps both whatever it needs
        return [operand for operand in operands[:1] if operand]
    if node.target in PRODUCTS:
        left, right = (operands[index] for index in PRODUCTS[node.target])
        return [a for a, b in ((left, right), (right, left)) if a and b in needs and is_tensor(a)]
    return []
