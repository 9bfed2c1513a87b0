"""A module that cannot be traced, as one operation: its own eager code, on weights that the graph gives it.

While a model is captured `STANDS_ALONE` is in the module's place. In the graph that comes of it there is an `Island`
instead, which holds the module's code without its weights.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from peftc.diagnostics.diagnostic import PeftcError
from peftc.kernels.common.errors import OtherOutput

library = torch.library.Library("peftc", "FRAGMENT")
library.define("stands_alone(int kind, Tensor[] given, Tensor[] own, SymInt[] numbers, SymInt[] sizes, "
               "str layouts) -> Tensor[]")  # fmt: skip
STANDS_ALONE = torch.ops.peftc.stands_alone.default


@dataclass(frozen=True)
class Layout:
    """A tensor that a module returns, but for its sizes; `order` are its dimensions as they lie in memory."""

    dtype: torch.dtype
    order: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))
        return cls(tensor.dtype, tuple(order) if tensor.permute(order).is_contiguous() else (*range(tensor.dim()),))

    def __str__(self) -> str:
        return " ".join([str(self.dtype).removeprefix("torch."), *map(str, self.order)])

    @classmethod
    def read(cls, text: str) -> Layout:
        dtype, *order = text.split()
        return cls(getattr(torch, dtype), tuple(map(int, order)))

    def empty(self, sizes: Sequence[Any], device: torch.device) -> Tensor:
        return torch.empty_permuted(sizes, self.order, dtype=self.dtype, device=device)

    def laid(self, tensor: Tensor) -> Tensor:
        """The same numbers as the graph takes them to lie."""
        there = tensor.permute(self.order)
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return tensor if there.is_contiguous() else there.contiguous().permute(back)


def _like(layouts: Sequence[Layout], sizes: Sequence[Any], device: torch.device) -> list[Tensor]:
    """Tensors of the sizes, which stand one behind the other."""
    made: list[Tensor] = []
    for layout in layouts:
        rank = len(layout.order)
        made.append(layout.empty(sizes[:rank], device))
        sizes = sizes[rank:]
    return made


@torch.library.impl(library, "stands_alone", "CompositeExplicitAutograd")
def _stands_alone(
    kind: int, given: list[Tensor], own: list[Tensor], numbers: list[Any], sizes: list[Any], layouts: str
) -> list[Tensor]:
    return _like([Layout.read(text) for text in layouts.split(";")], sizes, (*given, *own)[0].device)


@dataclass(frozen=True)
class Call:
    """How a module is called: the leaves of its arguments, of its result, and what stands for each.

    A leaf is a tensor or a number that the graph gives, by its place among those, or it is a constant. Of the result
    some are arguments as they were.
    """

    leaves: tuple[tuple[str, Any], ...]
    spec: pytree.TreeSpec
    results: tuple[tuple[str, Any], ...]
    result_spec: pytree.TreeSpec
    layouts: tuple[Layout, ...]

    def arguments(self, given: Sequence[Tensor], numbers: Sequence[Any]) -> Any:
        """What the module is called with: positional arguments, and those by name."""
        known = {"tensor": given, "number": numbers, "truth": [bool(number) for number in numbers]}
        leaves = [known[kind][value] if kind in known else value for kind, value in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)

    def result(self, given: Sequence[Tensor], made: Sequence[Tensor]) -> Any:
        """What the module returns."""
        known = {"made": made, "tensor": given}
        leaves = [known[kind][value] if kind in known else value for kind, value in self.results]
        return pytree.tree_unflatten(leaves, self.result_spec)


class Island:
    """The module at `path`: `skeleton` is its code, with tensors called `names` of which there is nothing but sizes.

    `reason` and `where` say why it is one. Autograd goes through the module's own operations.
    """

    __name__ = __qualname__ = "island"
    tags = (torch.Tag.nondeterministic_seeded,)  # what it draws nobody knows

    def __init__(
        self, path: str, skeleton: nn.Module, names: tuple[str, ...], call: Call, reason: str, where: str
    ) -> None:
        self.path, self.skeleton, self.names, self.call = path, skeleton, names, call
        self.reason, self.where = reason, where
        self._lock = threading.RLock()

    def over(self, skeleton: nn.Module) -> Island:
        """The same of another copy of the module's code."""
        return Island(self.path, skeleton, self.names, self.call, self.reason, self.where)

    def __repr__(self) -> str:
        return f"island({self.path})"

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, training: bool, given: Sequence[Tensor], own: Sequence[Tensor], numbers: Sequence[Any],
        sizes: Sequence[Any],
    ) -> list[Tensor]:  # fmt: skip
        """The tensors that the module makes.

        Args:
            training: whether it is in train mode.
            given: the tensors that it is called with.
            own: its parameters and buffers, in the order of `names`.
            numbers: the sizes that it is called with.
            sizes: those of what it returns, one behind the other.

        Raises:
            PeftcError: `other-output` where what it makes has other sizes.
        """
        first = (*given, *own)[0]
        if isinstance(first, FakeTensor) or first.is_meta:
            return _like(self.call.layouts, sizes, first.device)
        with self._lock:
            result = self.run(training, given, dict(zip(self.names, own, strict=True)), numbers)
        leaves = pytree.tree_leaves(result)
        found = [leaf for leaf, (kind, _) in zip(leaves, self.call.results, strict=True) if kind == "made"]
        left = list(sizes)
        for layout, tensor in zip(self.call.layouts, found, strict=True):
            wanted, left = tuple(left[: len(layout.order)]), left[len(layout.order) :]
            if tuple(tensor.shape) != wanted:
                raise PeftcError(OtherOutput(module=self.path, found=str([*tensor.shape]), wanted=str([*wanted])))
        return [layout.laid(tensor) for layout, tensor in zip(self.call.layouts, found, strict=True)]

    def run(self, training: bool, given: Sequence[Tensor], own: dict[str, Tensor], numbers: Sequence[Any]) -> Any:
        """What the module returns."""
        args, kwargs = self.call.arguments(given, numbers)
        return called(self.skeleton, training, own, args, kwargs)


def called(skeleton: nn.Module, training: bool, own: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
    """What a module makes with tensors for its own; batch norms go by their running statistics, as everywhere."""
    if skeleton.training is not training:
        skeleton.train(training)
    for module in skeleton.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.eval()
    return torch.func.functional_call(skeleton, own, args, kwargs)


def islands(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of a graph that are islands, in its order."""
    return [node for node in graph.nodes if isinstance(node.target, Island)]


def island_of(node: fx.Node) -> Island:
    """The island of such a node."""
    return cast(Island, node.target)


def own_tensors(node: fx.Node) -> dict[str, fx.Node]:
    """What an island's node reads for each parameter and buffer of the module, by the name that it has there."""
    operands = cast(Sequence[fx.Node], node.args[2])
    return dict(zip(island_of(node).names, operands, strict=True))
