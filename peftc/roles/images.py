"""Graph -> the sequence of a model that is given no tokens but numbers, such as an image cut into patches.

Its length is a constant all over the captured graph. It can be lengthened where that constant is no other size as
well, which is checked here, and again, shape by shape, once it has been changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from peftc.capture.capture import Captured
from peftc.graph.ir import block_of, get_attribute, is_tensor, value
from peftc.protocol.site import Sequence
from peftc.roles.stacks import BlockPath

aten = torch.ops.aten

# Operations whose whole numbers are sizes or ends of ranges.
SIZED = {
    aten.view.default, aten.reshape.default, aten.expand.default, aten.arange.default, aten.arange.start,
    aten.zeros.default, aten.ones.default, aten.full.default, aten.new_zeros.default, aten.new_ones.default,
    aten.new_full.default, aten.empty.memory_format, aten.slice.Tensor,
}  # fmt: skip
# What makes a mask in which a position sees only those before it.
CAUSAL = {
    aten.tril.default, aten.triu.default, aten.le.Tensor, aten.ge.Tensor, aten.lt.Tensor, aten.gt.Tensor,
}  # fmt: skip


def image_sequence(captured: Captured, blocks: list[BlockPath]) -> Sequence | None:
    """The value [batch, length, width] that enters the first block, positions added; None without one."""
    if not blocks:
        return None
    entry = next(_entering(captured.module.graph, blocks[0].path), None)
    if entry is None:
        return None
    length, width = value(entry).shape[1:]
    reader = _Reader(captured.module, entry)
    return Sequence(
        "sequence", "sequence", frozenset(), parameters=(_first_parameter(captured.module, blocks[0].path),),
        width=int(width), tokens=captured.inputs[0], length=int(length) if isinstance(length, int) else None,
        in_front=reader.is_causal, obstacle=reader.obstacle(), embeddings=entry,
    )  # fmt: skip


def _entering(graph: fx.Graph, block: str) -> Iterator[fx.Node]:
    """The values that the block reads from before it and that may be a sequence: float, of three dimensions."""
    for node in graph.nodes:
        if block_of(node, {block}):
            for argument in node.all_input_nodes:
                if argument.op != "get_attr" and not block_of(argument, {block}) and is_tensor(argument):
                    fake = value(argument)
                    if fake.dim() == 3 and fake.is_floating_point():
                        yield argument


def _first_parameter(module: fx.GraphModule, block: str) -> str:
    names = (str(node.target) for node in module.graph.find_nodes(op="get_attr"))
    return next(name for name in names if name.startswith(f"{block}."))


class _Reader:
    """How what stands behind the sequence reads it."""

    def __init__(self, module: fx.GraphModule, entry: fx.Node) -> None:
        self.module = module
        self.length: Any = value(entry).shape[1]
        self.after = downstream(entry)
        self.nodes = [node for node in module.graph.nodes if node not in upstream(entry)]

    @property
    def is_causal(self) -> bool:
        """Whether a position may depend on those before it alone, and a prompt must stand before all."""
        return any(
            node.target in CAUSAL
            or (
                node.target is aten.scaled_dot_product_attention.default
                and (node.kwargs.get("is_causal") or (len(node.args) > 5 and node.args[5]))
            )
            for node in self.nodes
        )

    def obstacle(self) -> str | None:
        """Why the sequence cannot be lengthened."""
        if not isinstance(self.length, int):
            return "its length is neither fixed nor an input's"
        if self.length in self._other_sizes():
            return f"its length of {self.length} is also another size of the model, and constants tell them not apart"
        if any(self._reads_a_moved_place(node) for node in self.after):
            return "it reads a place of the sequence, which a prompt would move"
        return None

    def _other_sizes(self) -> set[int]:
        """Sizes of tensors that are read behind the entry, and of computed values in other dimensions."""
        sizes: set[int] = set()
        for node in self.nodes:
            if node.op == "get_attr" and any(user in self.after for user in node.users):
                tensor = get_attribute(self.module, str(node.target))
                sizes |= set(tensor.shape) if isinstance(tensor, torch.Tensor) else set()
        return sizes

    def _reads_a_moved_place(self, node: fx.Node) -> bool:
        """Whether one place is picked that a prompt moves: from the start if it stands in front, else from the end."""
        if node.target is not aten.select.int:
            return False
        source, dim, place = node.args[:3]
        assert isinstance(source, fx.Node)
        assert isinstance(dim, int)
        assert isinstance(place, int)
        return value(source).shape[dim] == self.length and (place >= 0) == self.is_causal


def downstream(start: fx.Node) -> set[fx.Node]:
    """All nodes that depend on `start`."""
    found: set[fx.Node] = set()
    queue = [start]
    while queue:
        for user in queue.pop().users:
            if user not in found:
                found.add(user)
                queue.append(user)
    return found


def upstream(end: fx.Node) -> set[fx.Node]:
    """`end` and all that it depends on."""
    found, queue = {end}, [end]
    while queue:
        for argument in queue.pop().all_input_nodes:
            if argument not in found:
                found.add(argument)
                queue.append(argument)
    return found
