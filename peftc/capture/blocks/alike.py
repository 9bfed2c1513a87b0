"""Which blocks of a model may be equal, and what each does: every operation, of which tensors, with which numbers.

What a block does is seen by running its own code, on tensors without numbers and of the example's sizes: whatever it
asks of itself, of its parent, of the world, shows in what it computes. Blocks that do the same are equal.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers.exporters.utils import patch_attributes

from peftc.diagnostics import debug
from peftc.graph.ir import expression
from peftc.graph.rows import hint

FEW = 64  # numbers of a constant that is compared by them


def groups_of(model: nn.Module) -> list[tuple[str, ...]]:
    """The paths of blocks of one class, with tensors of the same sizes under the same names; outermost ones alone."""
    holders = Counter(id(tensor) for module in _every(model) for tensor in own_tensors(module).values())
    found: list[tuple[str, ...]] = []
    for path, container in model.named_modules():
        inside = any(path == block or path.startswith(f"{block}.") for group in found for block in group)
        if not isinstance(container, nn.ModuleList | nn.Sequential) or inside:
            continue
        alike: dict[Any, list[str]] = defaultdict(list)
        for name, block in container.named_children():
            if next(block.children(), None) is not None:
                alike[_looks(block, holders)].append(f"{path}.{name}" if path else name)
        found += [tuple(group) for group in alike.values() if len(group) > 1]
    return found


def _every(model: nn.Module) -> list[nn.Module]:
    """Each module as often as it stands somewhere."""
    return [module for _, module in model.named_modules(remove_duplicate=False)]


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers, without those of its submodules."""
    held = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def _looks(block: nn.Module, holders: Counter[int]) -> Any:
    """A block's class, and its tensors by name; one that others hold, too, is only equal to itself."""
    within = Counter(id(tensor) for module in _every(block) for tensor in own_tensors(module).values())
    parts = [
        (path, name, id(tensor) if holders[id(tensor)] > within[id(tensor)] else sizes_of(tensor))
        for path, module in block.named_modules(remove_duplicate=False)
        for name, tensor in own_tensors(module).items()
    ]
    return type(block), tuple(parts)


def sizes_of(tensor: Tensor) -> Any:
    """What is known of a tensor without its numbers; sizes are symbols where they are open."""
    lies = (*tensor.stride(), tensor.storage_offset()) if tensor.layout is torch.strided else ()
    numbers = tuple(map(expression, (*tensor.shape, *lies)))
    return tensor.layout, numbers, tensor.dtype, tensor.device, tensor.requires_grad


class Deeds(TorchDispatchMode):
    """What a block does with `given`: two that are equal have equal `lines`. `others`: what it reads of elsewhere."""

    def __init__(self, block: nn.Module, given: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines: list[Any] = []
        self.others: dict[int, Tensor] = {}
        self._held: list[Any] = [*given]  # so that no id is given again
        self._known: dict[int, Any] = {id(tensor): ("given", place) for place, tensor in enumerate(given)}
        for path, module in block.named_modules(remove_duplicate=False):
            for name, tensor in own_tensors(module).items():
                self._known.setdefault(id(tensor), ("own", path, name, sizes_of(tensor)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.lines.append((func, self.told((args, kwargs or {}))))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._held.append(leaf)
                self._known.setdefault(id(leaf), ("made", len(self._held)))
        return result

    def told(self, things: Any) -> Any:
        """Tensors by where they come from, all else as it is."""
        leaves, spec = pytree.tree_flatten(things)
        return str(spec), tuple(map(self._leaf, leaves))

    def is_made(self, tensor: Tensor) -> bool:
        """Whether it was given, or computed of what was."""
        return self._known.get(id(tensor), ("",))[0] in ("given", "made")

    def _leaf(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return type(leaf), str(leaf)
        if id(leaf) in self._known:
            return self._known[id(leaf)]
        if not isinstance(leaf, FakeTensor) and not leaf.is_meta and leaf.numel() <= FEW:
            with _disable_current_modes():
                return "constant", leaf.dtype, str(leaf.tolist())  # 0.0 is not -0.0
        self._held.append(leaf)
        self.others[id(leaf)] = leaf
        return "other", id(leaf)


def deeds(block: nn.Module, given: Sequence[Tensor], call: Callable[[Sequence[Tensor]], Any]) -> Deeds | None:
    """What a block does that `call` calls with tensors like `given`.

    Returns:
        None where that cannot be seen without numbers, or what comes back was not computed.
    """
    mode = next((tensor.fake_mode for tensor in given if isinstance(tensor, FakeTensor)), None)
    if mode is None or mode.shape_env is None:
        return None
    with ExitStack() as stack:
        # Nothing of this is for the trace: neither operations, nor which module they are of.
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(patch_attributes([(nn.Module, "__call__", lambda _traced: nn.Module._wrapped_call_impl)]))
        stack.enter_context(mode.shape_env.suppress_guards())
        stack.enter_context(mode)
        like = [_of_the_example(tensor) for tensor in given]
        found = Deeds(block, like)
        try:
            with enable_python_dispatcher(), found:
                result = call(like)
        except Exception as error:  # the block may do anything; it is traced then, and what is wrong is told by that
            debug.tell(2, [f"what {type(block).__name__} does is not known before it is traced: {error}"])
            return None
    if not all(found.is_made(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)):
        return None
    found.lines.append(found.told(result))
    return found


def _of_the_example(tensor: Tensor) -> Tensor:
    shape, strides = ([hint(size) for size in sizes] for sizes in (tensor.shape, tensor.stride()))
    return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)
