"""A frozen head and the cross-entropy of its logits, a chunk of tokens at a time."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from peftc.graph.ir import value as fake
from peftc.graph.patterns import add, anything, cast, either, mul, number, op, read_elsewhere, value
from peftc.protocol.rule import Editor, Fusion, Match, Miss, fusion

aten = torch.ops.aten
TOKENS, ENTRIES = 128, 1 << 22  # as many tokens a chunk as are fast, and more where their logits are small

_head = either(
    op(aten.linear.default, value("hidden"), value("weight")),
    op(aten.linear.default, value("hidden"), value("weight"), value("bias")),
    add(op(aten.linear.default, value("hidden"), value("weight")), value("bias")),
)
_scaled = either(
    mul(_head, number("factor")), op(aten.div.Tensor, _head, number("divisor")), _head
)  # fmt: skip
_logits = op((aten.view.default, aten.reshape.default), cast(_scaled), anything("shape"))
_options = (None, anything("reduction"), anything("ignored"), 0.0)
MEAN, SUM = 1, 2


@fusion
class ChunkedLoss(Fusion):
    """cross_entropy(W h + b, labels) from h itself: no more than a chunk of tokens has its logits at a time.

    The gradient of h is made beside the loss, so the backward pass needs no logits either. Only where nobody reads
    the logits: in the graph of a training step, which returns the loss without them.
    """

    name = "chunked_loss"
    in_training = True
    pattern = either(
        *(op(aten.cross_entropy_loss.default, _logits, value("labels"), *_options[:count]) for count in range(5))
    )

    def check(self, match: Match, editor: Editor) -> Miss | None:
        weight, bias, hidden = match["weight"], match["bias"], match["hidden"]
        for node in (weight, bias):
            if node is not None and editor.learns(node):
                return _miss(match, f"the head's {node.target} learns", node)
        if fake(hidden).dim() != 3:
            return _miss(match, "it has one label an example, none a token", hidden)
        classes, shape = fake(weight).shape[0], match["shape"]
        if match["reduction"] not in (None, MEAN, SUM) or len(shape) != 2 or shape[-1] != classes:
            return _miss(match, "it is no mean or sum over tokens", match.root)
        if fake(match["labels"]).is_floating_point():
            return _miss(match, "its labels are probabilities", match["labels"])
        if bias is not None and tuple(fake(bias).shape) not in ((classes,), (1, classes), (1, 1, classes)):
            return _miss(match, "what is added to its logits is not the same for all tokens", bias)
        if bias is not None and (match["factor"] is not None or match["divisor"] is not None):
            return _miss(match, "its logits have a bias and are scaled", bias)
        return read_elsewhere(match)

    def rewrite(self, matches: Sequence[Match], editor: Editor) -> list[fx.Node]:
        (match,) = matches
        here, weight, bias = match.root, match["weight"], match["bias"]
        vocabulary, width = fake(weight).shape
        hidden = editor.emit(match, here, aten.reshape.default, match["hidden"], [-1, width])
        if match["factor"] is not None:
            hidden = editor.emit(match, here, aten.mul.Tensor, hidden, match["factor"])
        if match["divisor"] is not None:
            hidden = editor.emit(match, here, aten.div.Tensor, hidden, match["divisor"])
        if bias is not None and fake(bias).dim() > 1:
            bias = editor.emit(match, here, aten.reshape.default, bias, [vocabulary])
        ignored = -100 if match["ignored"] is None else match["ignored"]
        chunk = max(TOKENS, ENTRIES // vocabulary)
        loss = torch.ops.peftc.cross_entropy.default
        both = editor.emit(match, here, loss, hidden, weight, bias, match["labels"], ignored, chunk)
        result = editor.emit(match, here, operator.getitem, both, 0)
        if match["reduction"] != SUM:
            count = editor.emit(match, here, operator.getitem, both, 1)
            result = editor.emit(match, here, aten.div.Tensor, result, count)
        if fake(result).dtype != fake(here).dtype:
            result = editor.emit(match, here, aten.to.dtype, result, fake(here).dtype)
        return [result]


def _miss(match: Match, reason: str, culprit: fx.Node) -> Miss:
    return Miss(match.root, reason, (culprit,))
