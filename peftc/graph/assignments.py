"""`whole[..., :n] = part` as a value: a graph in which nothing is written into shows where everything comes from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from peftc.graph.ir import computed, is_tensor, memory, moved, value

aten = torch.ops.aten

# A view of a part, and what gives the whole with that part replaced; both take the same arguments behind theirs.
SCATTERED: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


def assigned(node: fx.Node) -> bool:
    """Replaces a `copy_` into parts of a tensor made in the graph by a scatter, whose result is read from there on.

    Returns whether it did: where another view of the tensor is read behind the assignment, nothing is changed.
    """
    if node.target is not aten.copy_.default:
        return False
    views = _views(node.args[0])
    whole = views[0].args[0] if views else None
    if not isinstance(whole, fx.Node) or whole.op != "call_function" or not _is_fresh(whole):
        return False
    if any(user > node for view in _views_of(whole) if view < node for user in view.users):
        return False
    behind = {user for user in whole.users if user > node}
    part = new = _shaped(node, value(views[-1]))
    for view in reversed(views):
        new = _before(node, SCATTERED[view.target], view.args[0], new, *view.args[1:], **view.kwargs)
    whole.replace_all_uses_with(new, delete_user_cb=behind.__contains__)
    moved(new, whole, memory(whole))
    node.replace_all_uses_with(part)
    node.graph.erase_node(node)
    return True


def _views(node: Any) -> list[fx.Node]:
    """The slices and selections one after the other that end in `node`, outermost first."""
    views = []
    while isinstance(node, fx.Node) and node.target in SCATTERED:
        views.append(node)
        node = node.args[0]
    return views[::-1]


def _views_of(whole: fx.Node) -> Iterator[fx.Node]:
    """What lies in the memory that `whole` makes, but for itself."""
    own, seen, waiting = memory(whole), {whole}, [whole]
    while waiting:
        for user in waiting.pop().users:
            if user not in seen and is_tensor(user) and memory(user) == own:
                seen.add(user)
                waiting.append(user)
                yield user


def _is_fresh(node: fx.Node) -> bool:
    """Whether `node` makes memory of its own."""
    return all(memory(operand) != memory(node) for operand in node.all_input_nodes if is_tensor(operand))


def _shaped(node: fx.Node, part: torch.Tensor) -> fx.Node:
    """What `node` copies, in the dtype and the shape of the part that it writes."""
    source = node.args[1]
    assert isinstance(source, fx.Node)
    if value(source).dtype != part.dtype:
        source = _before(node, aten.to.dtype, source, part.dtype)
    if value(source).shape != part.shape:
        source = _before(node, aten.expand_as.default, source, node.args[0])
    return source


def _before(node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    with node.graph.inserting_before(node):
        made = node.graph.call_function(target, args, kwargs)
    made.meta = {**node.meta}
    made.meta["val"] = computed(made)
    return made
