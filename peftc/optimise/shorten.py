"""What autograd writes out at length, said shortly: rules on the graph of a forward and a backward pass.

Each is exact: no value changes by a bit, but for the sign of a zero.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from peftc.graph.ir import value

aten = torch.ops.aten
ENDLESS = 2**63 - 1  # the end of a slice that goes to the end
SAME = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}
BY_ONE = {aten.pow.Tensor_Scalar, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}


def shorten(graph: fx.Graph) -> fx.Graph:
    """Drops what computes nothing, joins what was taken apart, and computes once what is computed twice; in place."""
    known: dict[Hashable, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        instead = _same(node) or _joined(graph, node) or _known(node, known)
        if instead is not None:
            node.replace_all_uses_with(instead)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return graph


def _same(node: fx.Node) -> fx.Node | None:
    """The operand that `node` returns as it is."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return None
    alike = node.target in SAME
    if node.target is aten.clone.default:  # as of a dropout that drops nothing; what is returned is its own tensor
        returned = any(user.op == "output" for user in node.users)
        alike = not returned and first.op == "call_function" and value(first).stride() == value(node).stride()
    if node.target in BY_ONE:
        alike = isinstance(node.args[1], (int, float)) and node.args[1] == 1 and value(first).dtype == value(node).dtype
    if node.target in (aten.slice.Tensor, aten.slice_backward.default):
        _, start, end, step = _bounds(node)
        alike = start == 0 and end == ENDLESS and step == 1
    return first if alike else None


def _bounds(node: fx.Node) -> tuple[int, Any, Any, Any]:
    """Dimension, start, end and step of a slice, or of the gradient of one; an end that is the size is ENDLESS."""
    given = list(node.args[1:] if node.target is aten.slice.Tensor else node.args[2:])
    dim, start, end, step = given + [0, 0, ENDLESS, 1][len(given) :]
    assert isinstance(dim, int)
    whole = value(node.args[0] if node.target is aten.slice.Tensor else node)  # type: ignore[arg-type]
    size = whole.shape[dim]
    reaches = end is None or (isinstance(end, int) and isinstance(size, int) and end >= size)
    return dim % whole.dim(), start or 0, ENDLESS if reaches else end, step


def _joined(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """The sum of the gradients of two slices that meet and are the whole together: their concatenation."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    parts = [part for part in node.args if isinstance(part, fx.Node) and part.target is aten.slice_backward.default]
    if len(parts) != 2:
        return None
    bounds = [_bounds(part) for part in parts]
    if not all(isinstance(start, int) for _, start, _, _ in bounds):
        return None
    (dim, start, middle, one), (other, begin, end, two) = sorted(bounds, key=lambda item: item[1])
    if (dim, start, middle, end, one, two) != (other, 0, begin, ENDLESS, 1, 1):
        return None
    first, second = sorted(parts, key=lambda part: _bounds(part)[1])
    with graph.inserting_before(node):
        made = graph.call_function(aten.cat.default, ([first.args[0], second.args[0]], dim))
    made.meta = dict(node.meta)
    return made


def _known(node: fx.Node, known: dict[Hashable, fx.Node]) -> fx.Node | None:
    """An earlier node that computes the same; random ones never do."""
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return None
    leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
    key = (node.target, str(structure), tuple((type(leaf), str(leaf)) for leaf in leaves))
    earlier = known.setdefault(key, node)
    return None if earlier is node else earlier
