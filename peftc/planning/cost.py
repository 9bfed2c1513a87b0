"""What a training step needs: bytes of weights, gradients, optimiser state and activations, from shapes alone.

Activations are counted the way autograd keeps them: a tensor once, however many operations saved it, and only those
that a gradient needs. Sizes are the captured ones with batch and sequence put in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from peftc.graph.ir import get_attribute, is_tensor, value
from peftc.optimise.two_passes import cheapest, is_dear, may_repeat, weight_of
from peftc.planning.optimizers import STATE_BYTES
from peftc.planning.positions_left import extension
from peftc.planning.recompute import block_of
from peftc.protocol.site import Block
from peftc.roles.linears import GROUPED

if TYPE_CHECKING:
    from peftc.planning.planner import Binding, Plan

aten = torch.ops.aten


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def lines(self) -> tuple[str, ...]:
        """One line a kind."""
        return tuple(f"{name:<12}{formatted_bytes(size):>12}" for name, size in self.to_json().items())

    def to_json(self) -> dict[str, int]:
        """Bytes by kind."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
        }


def formatted_bytes(size: float) -> str:
    """Decimal units, two digits: 2.63 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


# Operations that keep their input, their output, or (by position) operands for the backward. A product keeps an
# operand only where the other one needs a gradient, which `_products` says.
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


def estimate(plan: Plan, batch: int, seq: int, optimizer: str) -> Memory:
    """Bytes of one training step of `plan`.

    Args:
        plan: of any device; its graph gives the shapes.
        batch: examples in a step.
        seq: tokens in an example; without effect on models that take no tokens.
        optimizer: a key of `peftc.planning.optimizers.STATE_BYTES`; its state is in the parameters' own precision.
    """
    if optimizer not in STATE_BYTES:
        raise ValueError(f"no optimizer {optimizer!r}; there are {', '.join(STATE_BYTES)}")
    module = plan.captured.module
    sizes = {name: item.dtype.itemsize for name, item in plan.stored.items()}
    sizes |= {name: get_attribute(module, name).element_size() for name in plan.sites.parameters if name not in sizes}
    dense = sum(count * sizes[name] for name, count in plan.sites.parameters.items() if name not in plan.stored)
    weights = dense + sum(item.bytes for item in plan.stored.values())
    beside = {name: sizes[binding.site.parameters[0]] for binding in plan.bindings for name in binding.tensors}
    added = [
        (prod(state.shape), state.dtype.itemsize if state.dtype else max(beside[name], 4), state.trainable)
        for name, state in plan.tensors.items()
    ]
    learning = [(count, size) for count, size, trains in added if trains]
    learning += [(plan.sites.parameters[name], sizes[name]) for name in plan.trained]
    known = _sizes(plan, batch, seq)
    return Memory(
        weights=weights + sum(count * size for count, size, _ in added),
        gradients=sum(count * size for count, size in learning),
        optimizer=sum(count * STATE_BYTES[optimizer](size) for count, size in learning),
        activations=sum(kept.bytes(known) for kept in plan.kept) * (2 if plan.consistency else 1),
    )


@dataclass(frozen=True, slots=True)
class Kept:
    """Something autograd keeps: a shape, symbolic where it was captured so, and bytes an element."""

    shape: tuple[Any, ...]
    size: int

    def bytes(self, known: dict[Any, int]) -> int:
        """Its bytes with the symbols' values put in."""
        dims = (int(d.node.expr.subs(known)) if isinstance(d, torch.SymInt) else int(d) for d in self.shape)
        return self.size * prod(dims)


def kept_for_backward(plan: Plan) -> tuple[Kept, ...]:
    """Everything a training step of `plan` keeps from the forward pass: each tensor's memory once.

    Of what the backward pass reads in a block, those values that `peftc.optimise.two_passes` keeps.
    """
    needs = _needing_gradients(plan)
    needed: dict[str | None, dict[fx.Node, None]] = defaultdict(dict)
    beside: list[Kept] = []
    for node in plan.captured.module.graph.nodes:
        block = block_of(node, plan.sites.blocks)
        if node.op != "call_function" or needs.isdisjoint(node.all_input_nodes):
            continue
        needed[block] |= dict.fromkeys(tensor for tensor in _kept_by(node, needs) if is_tensor(tensor))
        if block not in plan.checkpoints:
            beside += _kept_beside(node)
    replaced: dict[int, Kept] = {}
    for binding in plan.bindings:
        block = _block_of_site(binding.site, plan)
        if block not in plan.checkpoints:
            beside += _kept_by_branch(binding, needed[block], replaced)
    chosen = {node for block, wanted in needed.items() for node in _chosen(plan, block, wanted, needs)}
    kept = {_storage(node): _whole(node) for node in chosen if node.op == "call_function" and is_tensor(node)}
    return (*kept.values(), *replaced.values(), *beside)


def _block_of_site(site: Any, plan: Plan) -> str | None:
    """The block whose backward pass a branch at the site belongs to; that of a block's own branch is its own."""
    return site.path if isinstance(site, Block) else site.block if site.block in plan.sites.blocks else None


def _chosen(plan: Plan, block: str | None, wanted: dict[fx.Node, None], needs: set[fx.Node]) -> Iterable[fx.Node]:
    """What is kept so that the backward pass of a block has what it wants; outside of blocks that is all of it."""
    if block is None:
        return wanted
    members = [node for node in plan.captured.module.graph.nodes if block_of(node, {block}) is not None]
    inside = set(members)
    entering = dict.fromkeys(source for node in members for source in node.all_input_nodes if source not in inside)
    all_again = block in plan.checkpoints

    def weight(node: fx.Node) -> float:
        own = node in inside or node in needs or block_of(node, plan.sites.blocks) is not None
        return weight_of(node, set()) if own else 0  # masks, positions and weights are there anyway

    def again(node: fx.Node) -> bool:
        return node in inside and node.op == "call_function" and may_repeat(node) and (all_again or not is_dear(node))

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


def _kept_by_branch(binding: Binding, needed: dict[fx.Node, None], replaced: dict[int, Kept]) -> list[Kept]:
    """What an inserted branch keeps: the site's input, which branches share, and each narrow product of it."""
    site = binding.site
    shapes = [state.shape for state in binding.state.values() if state.trainable]
    narrow = binding.method.keeps(site)
    if narrow is None:
        narrow = sum(shape[-2] for shape in shapes if len(shape) > 1 and shape[-2] < shape[-1])
    read = _read_by_branch(site)
    for node in read:
        # What a block's branch reads is the hidden state as it was, not the sum that goes on.
        if isinstance(site, Block) and node is site.h and binding.method.changes(site):
            replaced[_storage(node)] = _whole(node)
        else:
            needed[node] = None
    # At a block all that is read goes into one product after the other; elsewhere each use is a branch of its own.
    branches = read[:1] if isinstance(site, Block) else read
    return [Kept((*value(x).shape[:-1], narrow), max(value(x).element_size(), 4)) for x in branches if narrow]


def _read_by_branch(site: Any) -> list[fx.Node]:
    """The values of the base model that a branch at the site reads."""
    if isinstance(site, Block):
        entering = [site.x] if site.before is None else []
        attention = site.reading.out.args if site.reading and site.memory else ()
        operands = [node for node in attention if isinstance(node, fx.Node) and is_tensor(node)]
        return [node for node in (site.h, *entering, *operands) if node is not None]
    uses = getattr(site, "uses", ()) or [use for use in [getattr(site, "entry", None)] if use]
    return [use.x for use in uses]


def _whole(node: fx.Node) -> Kept:
    """All the memory that a value lies in: of a slice autograd keeps the whole tensor."""
    return Kept((value(node).untyped_storage().nbytes(),), 1)


def _storage(node: fx.Node) -> int:
    """Which memory a value lies in: views of one tensor share it."""
    return int(value(node).untyped_storage()._cdata)


def _sizes(plan: Plan, batch: int, seq: int) -> dict[Any, int]:
    """The symbols of the inputs' dimensions: the first is the batch, the second counts tokens, prompts included."""
    known: dict[Any, int] = {}
    for fake in plan.input_values:
        for size, given in zip(fake.shape, (batch, seq + extension(plan.bindings)), strict=False):
            if isinstance(size, torch.SymInt):
                known[size.node.expr] = given
    return known


def _kept_by(node: fx.Node, needs: set[fx.Node]) -> Iterable[fx.Node]:
    operands = [argument if isinstance(argument, fx.Node) else None for argument in node.args]
    if node.target is ATTENTION:
        return [operand for operand in (*operands[:3], node) if operand]
    if node.target in KEEPS_INPUT:
        return node.all_input_nodes[:1]
    if node.target in KEEPS_OUTPUT:
        return [node]
    if str(node.target) in GROUPED:  # one autograd function, which keeps both whatever it needs
        return [operand for operand in operands[:1] if operand]
    if node.target in PRODUCTS:
        left, right = (operands[index] for index in PRODUCTS[node.target])
        return [a for a, b in ((left, right), (right, left)) if a and b in needs and is_tensor(a)]
    return []


def _needing_gradients(plan: Plan) -> set[fx.Node]:
    """The nodes a gradient flows through: all that depend on something that learns."""
    starts: set[fx.Node] = set()
    for binding in plan.bindings:
        site: Any = binding.site
        if not binding.method.changes(site):
            continue
        starts |= {use.y for use in getattr(site, "uses", ())}
        starts |= {node for name in ("h", "embeddings") if (node := getattr(site, name, None)) is not None}
    needs: set[fx.Node] = set()
    for node in plan.captured.module.graph.nodes:
        trained = node.op == "get_attr" and str(node.target) in plan.trained
        if trained or node in starts or any(argument in needs for argument in node.all_input_nodes):
            needs.add(node)
    return needs
