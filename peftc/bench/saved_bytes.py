"""What autograd keeps between the forward and the backward pass, in bytes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def saved_bytes(forward: Callable[[], Tensor], without: Iterable[Tensor]) -> int:
    """Bytes of the storages that the graph of `forward()`'s result holds, each once.

    Counted is what is still held when the forward has ended: tensors saved by operations, by `save_for_backward`, and
    those that a custom function keeps as attributes of its context. A view counts with the whole storage it is of.

    Args:
        forward: returns the tensor whose backward is to come.
        without: tensors whose storages do not count: parameters, buffers, inputs.
    """
    held: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor.detach())  # an operation's own output would hold the operation
        held.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = forward()
    tensors = [*(saved.tensor for saved in held), *_in_contexts(result)]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, tensors)}
    for tensor in without:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


class _Saved:
    """One saved tensor; the graph alone refers to it, so that it dies with what it was saved for."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _in_contexts(result: Tensor) -> Iterator[Tensor]:
    """Tensors among the attributes of custom functions' contexts, which no hook sees."""
    for node in _nodes(result):
        for value in getattr(node, "__dict__", {}).values():
            yield from (leaf for leaf in pytree.tree_leaves(value) if _has_storage(leaf))


def _nodes(result: Tensor) -> Iterator[Any]:
    """Every node of the graph behind a tensor."""
    queue = [result.grad_fn] if result.grad_fn else []
    seen = set(queue)
    while queue:
        node = queue.pop()
        yield node
        following = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= following
        queue += following


def _has_storage(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
