"""Where the graph multiplies by a weight: the spellings of a linear layer, told by operation and operand.

`aten.linear`, `addmm` and `matmul` with the weight as it is or transposed, or with some rows of it, a bias added by
hand, and grouped products with a stack of expert weights.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from peftc.graph.ir import get_attribute, is_tensor, value
from peftc.kernels.island import island_of, islands, own_tensors
from peftc.protocol.site import Use

aten = torch.ops.aten

TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default, aten.mT.default}
CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.detach.default, aten.alias.default}
# What gives some rows of a tensor, as a view.
SLICES = {
    aten.slice.Tensor, aten.narrow.default, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
    operator.getitem,
}  # fmt: skip
PRODUCTS = {aten.matmul.default, aten.mm.default, aten.bmm.default}
# x [tokens, in] sorted by expert, weights [experts, in, out], ends of the experts' tokens [experts] -> [tokens, out].
# By name: the second is registered when transformers' own code for it is imported.
GROUPED = {"aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"}


@dataclass(frozen=True, slots=True)
class Product:
    """One application of a weight parameter: y = x Wᵀ (+ b), or of some of its rows; `n_out` counts all of them."""

    use: Use
    weight: str
    bias: str | None
    transposed: bool
    n_in: int
    n_out: int
    experts: int = 0

    def has(self, rows: tuple[int, ...] | None) -> bool:
        """Whether this is of these rows of its weight, or of some of all."""
        return rows is None or self.use.first <= rows[0] < self.use.first + int(value(self.use.y).shape[-1])


def products(graph: fx.Graph) -> list[Product]:
    """Every application of a 2-d weight, or of a stack of them, in the graph's order."""
    found = (_product(node) for node in graph.nodes if node.op == "call_function")
    return [product for product in found if product]


@dataclass(frozen=True, slots=True)
class Inside:
    """A linear layer of torch's in an island, whose node is `reader`; the parameters' names in the graph."""

    name: str
    layer: nn.Linear
    weight: str
    bias: str | None
    reader: fx.Node


def inside_islands(graph: fx.Graph) -> Iterator[Inside]:
    """Every linear layer there."""
    for node in islands(graph):
        island, own = island_of(node), own_tensors(node)
        for path, layer in island.skeleton.named_modules():
            prefix = f"{path}." if path else ""
            if isinstance(layer, nn.Linear) and f"{prefix}weight" in own:
                bias = own.get(f"{prefix}bias")
                name = ".".join(filter(None, (island.path, path)))
                weight = str(own[f"{prefix}weight"].target)
                yield Inside(name, layer, weight, None if bias is None else str(bias.target), node)


def parameter_of(node: object) -> tuple[str, bool] | None:
    """(name, swapped) if `node` is a parameter, seen through casts and swaps of its last two dimensions."""
    swapped = False
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target in TRANSPOSES:
            swapped = not swapped
        elif node.target not in CASTS:
            return None
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr" or not is_tensor(node):
        return None
    owner = node.graph.owning_module
    if owner is not None and not isinstance(get_attribute(owner, str(node.target)), torch.nn.Parameter):
        return None
    return str(node.target), swapped


def sliced(node: object) -> tuple[fx.Node, int] | None:
    """What `node` is some rows of, neighbours and whole, and which is the first; (itself, 0) where it is no slice."""
    if not isinstance(node, fx.Node) or node.target not in SLICES or not is_tensor(node):
        return (node, 0) if isinstance(node, fx.Node) else None
    whole = node
    while whole.target in SLICES:
        whole = whole.all_input_nodes[0]
    if parameter_of(whole) is None:
        return None
    rows, all_rows = value(node), value(whole)
    if rows.shape[1:] != all_rows.shape[1:] or rows.stride() != all_rows.stride() or not all_rows.is_contiguous():
        return None
    return whole, int(rows.storage_offset() - all_rows.storage_offset()) // int(all_rows.stride()[0])


def _product(node: fx.Node) -> Product | None:
    if node.target is aten.linear.default:
        return _dense(node, 0, 1, node.args[2] if len(node.args) > 2 else None, flipped=False)
    if node.target is aten.addmm.default:
        plain = all(node.kwargs.get(factor, 1) == 1 for factor in ("beta", "alpha"))
        return _dense(node, 1, 2, node.args[0], flipped=True) if plain else None
    if node.target in PRODUCTS and is_tensor(node) and isinstance(node.args[1], fx.Node):
        if value(node.args[1]).dim() == 2:
            return _dense(node, 0, 1, None, flipped=True)
        return _grouped(node)
    if str(node.target) in GROUPED:
        return _grouped(node)
    return None


def _dense(node: fx.Node, x_index: int, w_index: int, bias: object, *, flipped: bool) -> Product | None:
    """`flipped`: the operation takes [in, out], so an unswapped parameter is stored transposed."""
    operand = node.args[w_index]
    if (found := sliced(operand)) is None:
        return None
    whole, first = found
    named = parameter_of(whole)
    if named is None or parameter_of(node.args[x_index]):
        return None
    weight, swapped = named
    transposed = flipped != swapped
    if whole is not operand and (flipped or transposed):
        return None
    before, after = value(whole).shape
    n_in, n_out = (before, after) if flipped else (after, before)
    bias_name, y = _bias(node, bias, n_out, first)
    use = Use(node, y, x_index, first=first)
    return Product(use, weight, bias_name, transposed, int(n_in), int(n_out))


def _grouped(node: fx.Node) -> Product | None:
    """A product with a 3-d parameter: [experts, in, out] as the operation sees it.

    Of all experts with the same number of tokens, or of tokens sorted by expert, whose ends are the third operand.
    """
    named = parameter_of(node.args[1])
    if named is None or not isinstance(node.args[1], fx.Node) or value(node.args[1]).dim() != 3:
        return None
    offsets = node.args[2] if len(node.args) > 2 else node.kwargs.get("offs")
    if node.target not in PRODUCTS and not isinstance(offsets, fx.Node):
        return None
    experts, n_in, n_out = (int(size) for size in value(node.args[1]).shape)
    use = Use(node, node, 0, offsets if isinstance(offsets, fx.Node) else None)
    return Product(use, named[0], None, not named[1], n_in, n_out, experts)


def _bias(node: fx.Node, bias: object, n_out: int, first: int) -> tuple[str | None, fx.Node]:
    """The bias's name and the node after it, also where it is added by an operation of its own."""
    if bias is not None:
        found = sliced(bias)
        named = parameter_of(found[0]) if found and found[1] == first and value(found[0]).shape == (n_out,) else None
        return (named[0] if named else None), node
    if len(node.users) != 1:
        return None, node
    (user,) = node.users
    if user.target is aten.add.Tensor and user.kwargs.get("alpha", 1) == 1:
        other = user.args[1] if user.args[0] is node else user.args[0]
        named = parameter_of(other)
        if named and isinstance(other, fx.Node) and value(other).shape == (n_out,):
            return named[0], user
    return None, node
