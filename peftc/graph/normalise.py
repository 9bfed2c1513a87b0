"""The captured graph, tidied: what `torch.export` writes for its own checks goes, dropout follows `training`.

Nothing here changes a number. It makes the graph a third shorter, which every later pass walks.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from peftc.graph.assignments import assigned
from peftc.graph.ir import PROVENANCE, STACK, Memory, Provenance, computed, fake_mode, is_tensor, memory, moved, value

aten = torch.ops.aten

# op -> where its `training` flag (or dropout probability, for attention) stands among the arguments
DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
RECURRENT = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
TRAINING_FLAG = {**dict.fromkeys(DROPOUTS, 2), **dict.fromkeys(RECURRENT, 6)}
# What makes a tensor whose numbers something else writes, and what makes the same of ones.
BLANK: dict[Any, Any] = {
    aten.empty.memory_format: aten.ones.default,
    aten.rand.default: aten.ones.default,
    aten.new_empty.default: aten.new_ones.default,
    aten.empty_like.default: aten.ones_like.default,
}
EINSUM = re.compile(r"([A-Za-z]+),([A-Za-z]+)->([A-Za-z]+)")
CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default}


def normalise(module: fx.GraphModule) -> None:
    """Tidies `module.graph` in place and recompiles it."""
    graph = module.graph
    _dropped_paths(graph)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target in CASTS and _is_identity(node):
            _bypass(node)
        elif node.target in TRAINING_FLAG:
            if node.target in DROPOUTS and node.args[1] == 0.0:
                _bypass(node)
            else:
                node.update_arg(TRAINING_FLAG[node.target], training_node(graph))
        elif node.target is aten.scaled_dot_product_attention.default:
            _attention_dropout(graph, node)
        elif node.target is aten.einsum.default:
            _as_product(node)
        elif node.target is aten.batch_norm.default and node.args[3] is not None:
            node.update_arg(5, False)
        elif assigned(node):
            continue
        elif (instead := _out_of_place(node.target)) and _is_private(node):
            source, where = node.args[0], memory(node)
            assert isinstance(source, fx.Node)
            node.target = instead
            node.meta["val"] = computed(node)
            moved(node, source, where)
    _drop_batch_counters(graph)
    graph.eliminate_dead_code()
    module.recompile()


def _dropped_paths(graph: fx.Graph) -> None:
    """Stochastic depth, drawn by hand in a branch on `training`, as the dropout of ones that it is: that follows it.

    Two spellings: x · (bernoulli(q) / q), and (x / q) · floor(rand + q).
    """
    for node in list(graph.nodes):
        if node.target is aten.bernoulli_.float and len(node.users) == 1:
            (blank, kept), (scaled,) = node.args, node.users
            divided = scaled.target in (aten.div.Tensor, aten.div_.Tensor) and scaled.args == (node, kept)
            if divided and _is_drawn_once(blank) and _only_multiplies(scaled):
                _drop(scaled, blank, kept)
                graph.erase_node(node)
        elif node.target is aten.floor.default and len(node.users) == 1 and _only_multiplies(node):
            total, (product,) = node.args[0], node.users
            other = next((factor for factor in product.args if factor is not node), None)
            if total.target is not aten.add.Tensor or len(total.users) > 1 or total.kwargs:
                continue
            blank, kept = total.args
            if _is_drawn_once(blank) and isinstance(other, fx.Node) and other.target is aten.div.Tensor:
                divided, by = other.args
                if by == kept:
                    product.replace_input_with(other, cast(fx.Node, divided))
                    _drop(node, blank, kept)


def _is_drawn_once(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target in BLANK and len(node.users) == 1


def _only_multiplies(node: fx.Node) -> bool:
    return all(user.target is aten.mul.Tensor for user in node.users)


def _drop(node: fx.Node, blank: fx.Node, kept: float) -> None:
    """Makes `node` ones in the shape of `blank`, of which a share is kept, and scaled so that the mean stays."""
    blank.target = BLANK[blank.target]
    node.target, node.args = aten.dropout.default, (blank, 1 - kept, True)
    node.meta["val"] = computed(node)


def tidy(module: fx.GraphModule) -> bool:
    """Removes the casts that splicing leaves behind, and lets its dropout follow `training`.

    Returns whether there was anything to do.
    """
    changed = False
    for node in list(module.graph.nodes):
        if node.target in CASTS and _is_identity(node):
            _bypass(node)
            changed = True
        elif node.target in TRAINING_FLAG and node.args[TRAINING_FLAG[node.target]] is True:
            node.update_arg(TRAINING_FLAG[node.target], training_node(module.graph))
            changed = True
    return bool(module.graph.eliminate_dead_code()) or changed


def _bypass(node: fx.Node) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def _is_identity(node: fx.Node) -> bool:
    """A cast to the dtype and device its input already has."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not is_tensor(node) or not is_tensor(source):
        return False
    before, after = value(source), value(node)
    return before.dtype == after.dtype and before.device == after.device and before.layout == after.layout


def _out_of_place(target: object) -> torch._ops.OpOverload | None:
    """The operation that computes what `target` writes over its first operand, where ATen has one."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or not target._schema.is_mutable:
        return None
    packet = getattr(aten, target._schema.name.partition("::")[2].removesuffix("_"), None)
    return getattr(packet, target._overloadname, None)


def _is_private(node: fx.Node) -> bool:
    """Whether nobody sees what `node` overwrites but by its result: no other view of it is read from there on."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "call_function":
        return False
    own = memory(source)
    seen, after = {node}, False
    for other in node.graph.nodes:
        if after and any(operand not in seen and _lies_in(operand, own) for operand in other.all_input_nodes):
            return False
        after = after or other is node
        if any(operand in seen for operand in other.all_input_nodes):
            seen.add(other)
    return not any(operand.op != "call_function" and _lies_in(operand, own) for operand in source.all_input_nodes)


def _lies_in(node: fx.Node, where: Memory) -> bool:
    return is_tensor(node) and memory(node) == where


def training_tensor(graph: fx.Graph) -> fx.Node:
    """`self.training` as a number in a tensor of no dimensions, made once: rewrites are traced with tensors only."""
    flag = training_node(graph)
    for user in flag.users:
        if user.target is aten.full.default:
            return user
    with graph.inserting_after(flag):
        node = graph.call_function(aten.full.default, ((), flag), {"dtype": torch.float32})
    node.meta["val"] = fake_mode(graph).from_tensor(torch.ones(()), static_shapes=True)
    node.meta[PROVENANCE] = Provenance("training", "")
    return node


def training_node(graph: fx.Graph) -> fx.Node:
    """Reads `self.training` where the graph runs, so that `train()` and `eval()` mean what they always mean."""
    for known in graph.find_nodes(op="get_attr", target="training"):
        return cast(fx.Node, known)
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.create_node("get_attr", "training")
    node.meta["val"] = True
    return node


def _attention_dropout(graph: fx.Graph, node: fx.Node) -> None:
    """Multiplies an attention's dropout probability by the flag, so that it is 0 in `eval()`."""
    probability = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    if not isinstance(probability, float) or probability == 0.0:
        return
    with graph.inserting_before(node):
        scaled = graph.call_function(operator.mul, (training_node(graph), probability))
    scaled.meta = {"val": probability, STACK: node.meta.get(STACK)}  # in the same block: a block's inputs are tensors
    if len(node.args) > 4:
        node.update_arg(4, scaled)
    else:
        node.update_kwarg("dropout_p", scaled)


def stays_random(graph: fx.Graph) -> fx.Node | None:
    """A node that draws random numbers whatever `training` says: a trace in train mode baked its branch in."""
    for node in graph.nodes:
        tags = getattr(node.target, "tags", ())
        follows = node.target in TRAINING_FLAG or node.target is aten.scaled_dot_product_attention.default
        if torch.Tag.nondeterministic_seeded in tags and node.users and not follows:
            return cast(fx.Node, node)
    return None


def _as_product(node: fx.Node) -> None:
    """A sum of products over one index, of two batches of matrices, is their product: `bhid,bhjd->bhij` are scores."""
    equation, operands = cast(tuple[str, list[fx.Node]], node.args[:2])
    found = EINSUM.fullmatch(equation.replace(" ", ""))
    if found is None or any(len({*labels}) < len(labels) for labels in found.groups()):
        return
    one, other, out = found.groups()
    batch = [label for label in out if label in one and label in other]
    rows, columns = ([label for label in out if label in own and label not in batch] for own in (one, other))
    inner = [label for label in one if label in other and label not in out]
    if not len(rows) == len(columns) == len(inner) == 1 or {*one, *other} != {*out, *inner}:
        return
    wanted = ([*batch, *rows, *inner], [*batch, *inner, *columns])
    first, second = (_turned(node, x, has, want) for x, has, want in zip(operands, (one, other), wanted, strict=True))
    product = _computed_before(node, aten.matmul.default, first, second)
    node.replace_all_uses_with(_turned(node, product, [*batch, *rows, *columns], out))
    node.graph.erase_node(node)


def _turned(before: fx.Node, node: fx.Node, has: Sequence[str], wanted: Sequence[str]) -> fx.Node:
    """A view with dimensions in another order."""
    order = [has.index(label) for label in wanted]
    if order == sorted(order):
        return node
    if order == [*range(len(order) - 2), len(order) - 1, len(order) - 2]:
        return _computed_before(before, aten.transpose.int, node, -2, -1)
    return _computed_before(before, aten.permute.default, node, order)


def _computed_before(node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """An operation in the place of `node`, of the same line of the model."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(target, args)
    made.meta = dict(node.meta)
    made.meta["val"] = computed(made)
    return made


def _drop_batch_counters(graph: fx.Graph) -> None:
    """A frozen batch norm uses its running statistics; their update counter has nothing left to count."""
    for node in graph.find_nodes(op="call_function", target=aten.add_.Tensor):
        counter = node.args[0]
        if isinstance(counter, fx.Node) and counter.op == "get_attr" and not node.users:
            graph.erase_node(node)
