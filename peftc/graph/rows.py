"""Which output features of a fused weight feed a value: asked of the operations themselves, by one gradient.

GPT-2 splits its fused QKV into thirds, GPT-NeoX and Bloom interleave it head by head, Falcon gathers it by index,
rotary embeddings mix it. Running the few nodes in between on random numbers and looking at where the gradient is
not zero answers for all of them, with no knowledge of any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, product
from typing import Any

import torch
from torch import fx

from peftc.graph.ir import get_attribute, tensor_inputs

Known = dict[str, tuple[tuple[int, ...], ...]]
Parts = Callable[[torch.Tensor], Sequence[torch.Tensor]]


def feature_rows(module: fx.GraphModule, source: fx.Node, target: fx.Node, known: Known) -> tuple[int, ...]:
    """The indices along the last dimension of `source` that `target` depends on, ascending.

    The nodes in between run on the CPU at the sizes of the capture's example. `known` remembers the answers by the
    path's shape: equal blocks ask once.
    """
    return rows_of_parts(module, source, target, known, lambda result: [result])[0]


def runs_along(module: fx.GraphModule, source: fx.Node, target: fx.Node, known: Known) -> bool:
    """Whether `target` is made of `source`, both [..., tokens, features], by a run along the tokens.

    Then the last token depends on others, and the first on itself alone: a recurrence, a scan, a causal convolution.
    """
    if source.meta["val"].dim() < 3 or str(source.meta["val"].shape[:-1]) != str(target.meta["val"].shape[:-1]):
        return False
    path = path_between(source, target)
    key = f"{runs_along.__qualname__}\n{_shape_of_path(module, source, path)}"
    if key not in known:
        with torch.enable_grad():
            start, result, weights = _run(module, source, target, path)
            known[key] = tuple(_seen_by(start, (result * weights).select(-2, token).sum()) for token in (0, -1))
    first, last = known[key]
    return first == (0,) and len(last) > 1


def _seen_by(start: torch.Tensor, part: torch.Tensor) -> tuple[int, ...]:
    """The tokens of `start` that a number depends on."""
    (gradient,) = torch.autograd.grad(part, start, retain_graph=True)
    return tuple(gradient.abs().sum(-1).flatten(0, -2).sum(0).nonzero().flatten().tolist())


def rows_of_parts(
    module: fx.GraphModule, source: fx.Node, target: fx.Node, known: Known, parts: Parts
) -> tuple[tuple[int, ...], ...]:
    """`feature_rows` of each tensor that `parts` makes of the target's value, such as one for each head."""
    path = path_between(source, target)
    key = f"{parts.__qualname__}\n{_shape_of_path(module, source, path)}"
    if key not in known:
        masked = any(_is_mask(argument) for node in path for argument in node.all_input_nodes)
        asked = []
        with torch.enable_grad():  # also where the caller compiles or loads without gradients
            # One mask fills where it is set, another where it is not; what is clipped from above is not from below.
            for masks, sign in product((True, False) if masked else (True,), (1, -1)):
                start, result, weights = _run(module, source, target, path, masks, sign)
                pairs = zip(parts(result), parts(weights), strict=True)
                asked.append([_touched(start, part, own) for part, own in pairs])
        known[key] = tuple(tuple(sorted({*chain(*rows)})) for rows in zip(*asked, strict=True))
    return known[key]


def _is_mask(node: fx.Node) -> bool:
    fake = node.meta.get("val")
    return isinstance(fake, torch.Tensor) and fake.dtype is torch.bool


def _touched(start: torch.Tensor, result: torch.Tensor, weights: torch.Tensor) -> tuple[int, ...]:
    (gradient,) = torch.autograd.grad((result * weights).sum(), start, retain_graph=True)
    touched = gradient.reshape(-1, gradient.shape[-1]).abs().sum(0) != 0
    return tuple(touched.nonzero().flatten().tolist())


def _run(
    module: fx.GraphModule, source: fx.Node, target: fx.Node, path: list[fx.Node], masks: bool = True, sign: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random numbers for the source, what the target makes of them, and random weights for its sum.

    Masks that the model makes are set everywhere, or nowhere; the source's numbers are turned by `sign`.
    """
    generator = torch.Generator().manual_seed(0)
    env: dict[fx.Node, Any] = {}
    start = (sign * _number(source, generator)).requires_grad_()
    env[source] = start
    for node in path:
        for argument in node.all_input_nodes:
            if argument not in env:
                env[argument] = _operand(module, argument, generator, masks)
        assert callable(node.target)
        args, kwargs = (fx.map_arg(given, env.__getitem__) for given in (node.args, node.kwargs))
        env[node] = node.target(*on_cpu(args), **on_cpu(kwargs))
    result = env[target]
    weights = torch.rand(result.shape, generator=generator, dtype=result.dtype) + 0.5
    return start, result, weights


def _shape_of_path(module: fx.GraphModule, source: fx.Node, path: list[fx.Node]) -> str:
    """The path written with places for names: the same for every layer that does the same."""
    places = {node: f"%{index}" for index, node in enumerate([source, *path])}

    def written(node: fx.Node) -> str:
        if node in places:
            return places[node]
        fake = node.meta["val"]
        if not isinstance(fake, torch.Tensor):
            return str(hint(fake))
        if fake.is_floating_point():
            return f"{tuple(fake.shape)} {fake.dtype}"
        return str(_operand(module, node, torch.Generator()).tolist())  # an index: what it says matters

    lines = [f"{node.target} {fx.map_arg((node.args, node.kwargs), written)}" for node in path]
    return "\n".join([str(tuple(source.meta["val"].shape)), *lines])


def path_between(source: fx.Node, target: fx.Node) -> list[fx.Node]:
    """The nodes on some way from `source` to `target`, in the graph's order, without `source`."""
    reached, segment = {source}, []
    node = source
    while node is not target:
        node = node.next
        if any(argument in reached for argument in node.all_input_nodes):
            reached.add(node)
            segment.append(node)
    needed, path = {target}, []
    for node in reversed(segment):
        if node in needed:
            path.append(node)
            needed.update(node.all_input_nodes)
    return path[::-1]


def _operand(module: fx.GraphModule, node: fx.Node, generator: torch.Generator, masks: bool = True) -> Any:
    """A value for something the path reads: stored index tensors as they are, everything else random."""
    if node.op == "get_attr":
        stored = get_attribute(module, str(node.target))
        if not isinstance(stored, torch.Tensor) or not stored.is_floating_point():
            return stored
    if node.op == "call_function" and not list(tensor_inputs(node)) and not node.all_input_nodes:
        assert callable(node.target)
        return node.target(*on_cpu(node.args), **on_cpu(node.kwargs))
    if node.op == "call_function" and "lift_fresh" in str(node.target):
        return _operand(module, node.all_input_nodes[0], generator, masks)
    return _number(node, generator, masks)


def _number(node: fx.Node, generator: torch.Generator, masks: bool = True) -> Any:
    """Random numbers of the node's fake shape and dtype, a mask set or not; its hint for a symbolic size."""
    fake = node.meta["val"]
    if not isinstance(fake, torch.Tensor):
        return hint(fake)
    shape = [hint(size) for size in fake.shape]
    if fake.is_floating_point():
        return torch.rand(shape, generator=generator, dtype=torch.float32).to(fake.dtype) + 0.5
    return torch.full(shape, masks if fake.dtype is torch.bool else 1, dtype=fake.dtype)


def hint(size: Any) -> Any:
    """A size as it was in the capture's example; of one that depends on numbers, which it does not know, one."""
    if not isinstance(size, torch.SymInt):
        return size
    return 1 if size.node.hint is None else int(size.node.hint)


def on_cpu(arguments: Any) -> Any:
    """The same arguments with every device replaced: a graph captured on the meta device names that one."""
    return torch.utils._pytree.tree_map(
        lambda item: torch.device("cpu") if isinstance(item, torch.device) else item, arguments
    )
