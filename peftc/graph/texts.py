"""Texts in a row at a model that reads none off its positions: each token sees its own text's alone there, too.

Of transformers' models some make their mask of positions, some, as alike as these are, do not: what is given to both is
the same, and who gives positions that begin again and no mask means several texts.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from peftc.graph.ir import Provenance, expression, is_tensor, splice, trace, value
from peftc.graph.masks import seen

aten = torch.ops.aten


def same_text(positions: Tensor) -> Tensor:
    """[rows, tokens] -> which tokens [rows, 1, tokens, tokens] are of one text: positions go on by one within it."""
    steps = torch.diff(positions, 1, -1, positions[:, :1] - 1)
    number = (steps != 1).cumsum(-1)
    return number[:, None, :, None] == number[:, None, None, :]


def tell_texts_apart(graph: fx.Graph, positions: fx.Node) -> bool:
    """Has every causal mask of all tokens by all hide other texts, in place; whether there was one.

    Args:
        graph: one that nothing was inserted in.
        positions: its input of positions [rows, tokens]; a mask that is made of them is left as it is.
    """
    if value(positions).dim() != 2:
        return False
    tokens = expression(value(positions).shape[1])
    causal = [node for node in graph.nodes if _is_causal(node, tokens)]
    known = set(causal)
    ends = [node for node in causal if not known.issuperset(node.users)]
    if not ends:
        return False
    stamp = Provenance("capture", "")
    last = graph.find_nodes(op="placeholder")[-1]
    same, _ = splice(graph, trace(same_text, value(positions)), [positions], last, stamp, positions)
    template = trace(torch.logical_and, value(ends[0]), value(same))
    for node in ends:
        readers = [user for user in node.users if user not in known]
        if value(node).shape != value(ends[0]).shape:
            template = trace(torch.logical_and, value(node), value(same))
        both, _ = splice(graph, template, [node, same], max(node, same), stamp, node)
        for reader in readers:
            reader.replace_input_with(node, both)
    return True


def _is_causal(node: fx.Node, tokens: object) -> bool:
    if node.op != "call_function" or not is_tensor(node) or value(node).dim() != 4:
        return False
    if [expression(size) for size in value(node).shape[-2:]] != [tokens, tokens]:
        return False
    says = seen(node)
    return says is not None and says.causal and says.positions is None
