"""What a training step needs: bytes of weights, gradients, optimiser state and activations, from shapes alone.

Activations are counted the way autograd keeps them: a tensor once, however many operations saved it, and only those
that a gradient needs. Sizes are the captured ones with batch and sequence put in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from peftc.ir import get_attribute, is_tensor, value

if TYPE_CHECKING:
    from peftc.plan import Plan

aten = torch.ops.aten

# Optimiser -> bytes of state for each parameter of `size` bytes.
OPTIMIZERS: dict[str, Callable[[int], int]] = {
    "adamw": lambda size: 2 * size,
    "adam": lambda size: 2 * size,
    "sgd": lambda size: 0,
    "momentum": lambda size: size,
    "lion": lambda size: size,
    "adamw8bit": lambda size: 2,
}


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
VIEWS = {
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.expand.default,
    aten.slice.Tensor, aten.unsqueeze.default, aten.squeeze.dim, aten.alias.default, aten.t.default,
    aten.contiguous.default, aten.select.int, aten.detach.default,
}  # fmt: skip
ATTENTION = aten.scaled_dot_product_attention.default


def estimate(plan: Plan, batch: int, seq: int, optimizer: str) -> Memory:
    """Bytes of one training step of `plan`.

    Args:
        plan: of any device; its graph gives the shapes.
        batch: examples in a step.
        seq: tokens in an example; without effect on models that take no tokens.
        optimizer: a key of `OPTIMIZERS`; its state is in the parameters' own precision.
    """
    module = plan.captured.module
    sizes = {name: get_attribute(module, name).element_size() for name in plan.sites.parameters}
    weights = sum(count * sizes[name] for name, count in plan.sites.parameters.items())
    added = [
        (prod(state.shape), max(sizes[binding.site.parameters[0]], 4), state.trainable)
        for binding in plan.bindings
        for state in binding.state.values()
    ]
    learning = [(count, size) for count, size, trains in added if trains]
    learning += [(plan.sites.parameters[name], sizes[name]) for name in plan.trained]
    return Memory(
        weights=weights + sum(count * size for count, size, _ in added),
        gradients=sum(count * size for count, size in learning),
        optimizer=sum(count * OPTIMIZERS[optimizer](size) for count, size in learning),
        activations=_activations(plan, batch, seq),
    )


def _activations(plan: Plan, batch: int, seq: int) -> int:
    """Bytes that autograd keeps from the forward pass."""
    size_of = _Sizes(plan, batch, seq)
    needs = _needing_gradients(plan)
    kept: dict[fx.Node, int] = {}
    masks = 0
    for node in plan.captured.module.graph.nodes:
        if node not in needs or node.op != "call_function":
            continue
        for tensor in _kept_by(node, needs):
            base = _storage(tensor)
            if base.op == "call_function" and is_tensor(base):
                kept[base] = size_of(value(base))
        if node.target is aten.dropout.default:
            masks += size_of.count(value(node))
        elif node.target is aten.cross_entropy_loss.default:
            kept[node] = size_of(value(node.args[0]))  # the log-probabilities
    return sum(kept.values()) + masks + _branches(plan, size_of, kept)


def _kept_by(node: fx.Node, needs: set[fx.Node]) -> Iterable[fx.Node]:
    operands = [argument if isinstance(argument, fx.Node) else None for argument in node.args]
    if node.target is ATTENTION:
        return [operand for operand in (*operands[:3], node) if operand]
    if node.target in KEEPS_INPUT:
        return node.all_input_nodes[:1]
    if node.target in KEEPS_OUTPUT:
        return [node]
    if node.target in PRODUCTS:
        left, right = (operands[index] for index in PRODUCTS[node.target])
        return [a for a, b in ((left, right), (right, left)) if a and b in needs and is_tensor(a)]
    return []


def _needing_gradients(plan: Plan) -> set[fx.Node]:
    """The nodes a gradient flows through: all that depend on something that learns."""
    starts: set[fx.Node] = set()
    for binding in plan.bindings:
        site: Any = binding.site
        starts |= {use.y for use in getattr(site, "uses", ())} | {h for h in [getattr(site, "h", None)] if h}
    needs: set[fx.Node] = set()
    for node in plan.captured.module.graph.nodes:
        trained = node.op == "get_attr" and str(node.target) in plan.trained
        if trained or node in starts or any(argument in needs for argument in node.all_input_nodes):
            needs.add(node)
    return needs


def _branches(plan: Plan, size_of: _Sizes, kept: dict[fx.Node, int]) -> int:
    """What the inserted branches keep: the site's input, once, and each narrow product of it."""
    total = 0
    for binding in plan.bindings:
        site: Any = binding.site
        uses = getattr(site, "uses", ()) or [use for use in [getattr(site, "entry", None)] if use]
        for use in uses:
            base = _storage(use.x)
            if base not in kept and base.op == "call_function":
                kept[base] = 0
                total += size_of(value(base))
            tokens = size_of.count(value(use.x)) // int(value(use.x).shape[-1])
            shapes = [state.shape for state in binding.state.values() if state.trainable]
            narrow = sum(shape[0] for shape in shapes if len(shape) == 2 and shape[0] < shape[1])
            total += tokens * narrow * max(value(use.x).element_size(), 4)
    return total


def _storage(node: fx.Node) -> fx.Node:
    """The node whose memory `node` looks at."""
    while node.target in VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


class _Sizes:
    """Bytes of symbolic shapes, with the batch and the sequence put in."""

    def __init__(self, plan: Plan, batch: int, seq: int) -> None:
        self.known: dict[Any, int] = {}
        for node in plan.captured.module.graph.find_nodes(op="placeholder"):
            if is_tensor(node):
                for size, given in zip(value(node).shape, (batch, seq), strict=False):
                    if isinstance(size, torch.SymInt):
                        self.known[size.node.expr] = given

    def count(self, fake: torch.Tensor) -> int:
        """Elements."""
        return int(prod(self._size(size) for size in fake.shape))

    def __call__(self, fake: torch.Tensor) -> int:
        return self.count(fake) * fake.element_size()

    def _size(self, size: Any) -> int:
        return int(size.node.expr.subs(self.known)) if isinstance(size, torch.SymInt) else int(size)
