"""Sites for parameters that are there already: norms, biases, embeddings, convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx, nn

from peftc.graph.ir import is_tensor, module_path, own_name, value
from peftc.kernels.island import Island, island_of, own_tensors
from peftc.protocol.site import Block, Parameters, Site
from peftc.roles.products import CASTS, SLICES, parameter_of

aten = torch.ops.aten

NORMS = {
    aten.layer_norm.default: (2, 3),
    aten.group_norm.default: (2, 3),
    aten.batch_norm.default: (1, 2),
    aten.instance_norm.default: (1, 2),
    aten.rms_norm.default: (2,),
}
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default} | {
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
}  # fmt: skip
# What may be done to a bias before it is added: parts of it put together with others, or overwritten.
PARTED = SLICES | {aten.cat.default, aten.clone.default, aten.slice_scatter.default}
# operation -> where its bias stands
BIASED = {
    aten.linear.default: 2,
    aten.addmm.default: 0,
    **dict.fromkeys(CONVOLUTIONS, 2),
    **{norm: places[1] for norm, places in NORMS.items() if len(places) > 1},
}


# torch's layers that say what they are -> role
LAYERS: dict[Any, str] = {
    nn.Linear: "linear",
    nn.Embedding: "embed",
    (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase): "norm",
    nn.modules.conv._ConvNd: "conv",
}


def existing_parameters(module: fx.GraphModule, blocks: list[Block], aliases: dict[str, list[str]]) -> list[Site]:
    """One site a norm, bias, embedding and convolution, in the graph's order, and then the blocks."""
    found: list[Site] = []
    for node in module.graph.nodes:
        found += _in_island(node) if isinstance(node.target, Island) else _at(node, aliases)
    return _merged([*found, *blocks])


def _in_island(node: fx.Node) -> Iterator[Site]:
    """What the parts of an island have: torch's own layers say what they are, others are traced by themselves."""
    own = {name: str(operand.target) for name, operand in own_tensors(node).items()}
    for path, part in island_of(node).skeleton.named_modules():
        prefix = f"{path}." if path else ""
        name = ".".join(filter(None, (island_of(node).path, path)))
        held = {each: own[prefix + each] for each in part._parameters if prefix + each in own}
        role = next((role for kinds, role in LAYERS.items() if isinstance(part, kinds)), None)
        if role is None and held and next(part.children(), None) is None and _is_norm(part):
            role = "norm"
        if role and role != "linear" and held:
            yield Parameters(name, name, frozenset({role}), parameters=tuple(held.values()))
        if role and role != "embed" and "bias" in held:
            yield Parameters(held["bias"], name, frozenset({"bias"}), parameters=(held["bias"],))


def _is_norm(part: nn.Module) -> bool:
    """Whether a layer with one parameter scales a root mean square by it."""
    weights = list(part.parameters())
    if len(weights) != 1 or weights[0].dim() != 1:
        return False
    try:
        program = torch.export.export(part, (torch.empty(2, 3, len(weights[0]), device="meta"),), strict=False)
    except Exception:  # whatever its code wants, it is no norm that is called as one
        return False
    return any(node.op == "get_attr" and _scales_a_root_mean_square(node) for node in program.module().graph.nodes)


def _at(node: fx.Node, aliases: dict[str, list[str]]) -> Iterator[Site]:
    if node.target in NORMS:
        yield from _site("norm", [node.args[index] for index in NORMS[node.target] if index < len(node.args)])
    elif node.target is aten.embedding.default and (named := parameter_of(node.args[0])):
        path = own_name(named[0], module_path(node), aliases).rpartition(".")[0]
        yield Parameters(path, path, frozenset({"embed"}), parameters=(named[0],))
    elif node.target in CONVOLUTIONS:
        yield from _site("conv", [node.args[1], node.args[2] if len(node.args) > 2 else None])
    elif node.op == "get_attr" and _scales_a_root_mean_square(node):
        yield from _site("norm", [node])
    if node.op == "get_attr" and (named := parameter_of(node)) and _is_bias(node):
        yield Parameters(named[0], named[0].rpartition(".")[0], frozenset({"bias"}), parameters=(named[0],))


def _site(role: str, operands: list[object]) -> Iterator[Site]:
    names = [named[0] for operand in operands if (named := parameter_of(operand))]
    if names:
        path = names[0].rpartition(".")[0] or names[0]
        yield Parameters(path, path, frozenset({role}), parameters=tuple(names))


def _is_bias(node: fx.Node) -> bool:
    """A 1-d parameter that some operation adds, whole or in part: as its bias operand, or in a sum of its own."""
    if is_tensor(node) and value(node).dim() != 1:
        return False
    for user in node.users:
        if user.target in PARTED and _is_bias(user):
            return True
        if user.target is aten.add.Tensor and len(user.all_input_nodes) == 2:
            return True
        position = BIASED.get(cast(Any, user.target))
        if position is not None and position < len(user.args) and user.args[position] is node:
            return True
    return False


def _scales_a_root_mean_square(node: fx.Node) -> bool:
    """A 1-d parameter (or 1 + it) that multiplies x · rsqrt(mean(x²)): an RMSNorm spelt out."""
    if node.meta.get("val") is None or not isinstance(node.meta["val"], torch.Tensor) or value(node).dim() != 1:
        return False
    for user in node.users:
        if user.target is aten.mul.Tensor and any(
            other is not node and _has_rsqrt(other) for other in user.all_input_nodes
        ):
            return True
        if (user.target in CASTS or _adds_a_number(user)) and _scales_a_root_mean_square(user):
            return True
    return False


def _adds_a_number(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and len(node.all_input_nodes) == 1


def _has_rsqrt(node: fx.Node) -> bool:
    while node.target in CASTS:
        node = node.all_input_nodes[0]
    return node.target is aten.mul.Tensor and any(other.target is aten.rsqrt.default for other in node.all_input_nodes)


def _merged(sites: list[Site]) -> list[Site]:
    """Sites of one name made one, such as an embedding read twice."""
    by_name: dict[str, Site] = {}
    for site in sites:
        known = by_name.get(site.name)
        if known is None:
            by_name[site.name] = site
        elif not set(site.parameters) <= set(known.parameters) or not site.roles <= known.roles:
            names = dict.fromkeys((*known.parameters, *site.parameters))
            kept = site if isinstance(site, Block) else known
            by_name[site.name] = replace(kept, roles=known.roles | site.roles, parameters=tuple(names))
    return list(by_name.values())
