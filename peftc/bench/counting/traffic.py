"""Bytes that an operation on tensors reads and writes, by its schema and the sizes of what it is given and returns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Of their first operand they read as many numbers as they return.
PICKING = frozenset({"index_select", "index", "gather", "embedding", "take", "nll_loss_forward"})
# Of what they write in they touch as many numbers as they bring.
PLACING = frozenset({"index_add_", "index_copy_", "index_put_", "_index_put_impl_", "scatter_", "scatter_add_"})
# They write over all of their first operand and read nothing of it.
FILLING = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_", "exponential_"})
# They ask their first operand, or the one named, for its shape alone.
SHAPED = frozenset({"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "rand_like",
                    "randn_like"})  # fmt: skip


def bytes_of(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor's elements: a dimension that is expanded is there once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return prod(sizes) * tensor.element_size()


def place(tensor: Tensor) -> tuple[Any, ...]:
    """Which memory a tensor is, and which part of it."""
    return memory(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def memory(tensor: Tensor) -> int:
    """Which memory a tensor is in. It has no address: it is known by the object."""
    return int(tensor.untyped_storage()._cdata)


def tensors(given: Any) -> Iterator[Tensor]:
    """Tensors on the device, in a nest of lists and dicts: numbers on the host come with the launch."""
    yield from (leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor) and leaf.device.type != "cpu")


def traffic(
    op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> tuple[int, int] | None:
    """Bytes read and written; None where nothing is: a view, or room that is not filled.

    An operand counts once, however often a product reads it: what a cache keeps is not known here.
    """
    name = op._schema.name.rpartition("::")[2]
    given = list(_operands(op, args, kwargs))
    inside = {memory(tensor) for _, tensor, _ in given}
    made = [tensor for tensor in tensors(result) if memory(tensor) not in inside]
    changed = _apart(tensor for _, tensor, written in given if written)
    if not (made or changed) or name.startswith(("empty", "new_empty")):
        return None
    most = sum(map(bytes_of, made)) if name in PICKING else None
    if name in PLACING:
        most = max((bytes_of(tensor) for position, tensor, _ in given if position), default=0)
    read = written = 0
    seen = set()
    for position, tensor, writes in given:
        if place(tensor) in seen:
            continue
        seen.add(place(tensor))
        size = bytes_of(tensor)
        if most is not None and position == 0:
            size = min(size, most)
        written += size if writes else 0
        blind = position == "out" or (position == 0 and (name in SHAPED or name in FILLING or kwargs.get("beta") == 0))
        read += 0 if blind else size
    return read, written + sum(map(bytes_of, _apart(made)))


def _operands(
    op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[int | str, Tensor, bool]]:
    """Place, tensor and whether it is written, of each that an operation is given."""
    for position, argument in enumerate(op._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tensors(value):
            yield ("out" if writes and argument.kwarg_only else position), tensor, writes


def _apart(given: Iterable[Tensor]) -> list[Tensor]:
    """No piece of memory twice."""
    return list({place(tensor): tensor for tensor in given}.values())
