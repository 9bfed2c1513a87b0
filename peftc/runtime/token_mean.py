"""The mean over the tokens of several batches: `num_items_in_batch`, as transformers' losses take it.

A Trainer that accumulates gradients counts the labels of all batches of a step and passes the number; each batch's loss
is then its sum divided by that, so that every token weighs the same. The graph was captured with a mean of its own.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import fx, nn

from peftc.graph.ir import copied, fake_mode
from peftc.planning.plan import Plan
from peftc.rewrite.penalties import penalised

aten = torch.ops.aten
NAME = "num_items_in_batch"
MEAN, SUM = 1, 2
# A call that transformers passes the number on to; a model that computes a loss itself, or calls this without what it
# was given by keyword, ignores it.
LOSS = "loss_function("
PASSED_ON = re.compile(r"loss_function\((?:[^()]|\([^()]*\))*\*\*")


def with_token_count(graph: fx.Graph, plan: Plan) -> fx.Graph | None:
    """`graph` with an input more, the number that the sum over its tokens is divided by, in place of their own.

    None where the base model would not make use of the number, or something else joins the loss in each batch.
    """
    means = [node for node in graph.nodes if node.target == aten.cross_entropy_loss.default]
    if len(means) != 1 or not _is_mean(means[0]) or not _takes_count(plan.captured.model):
        return None
    if LOSS not in str(means[0].meta.get("stack_trace")) or penalised(plan) or plan.consistency:
        return None
    new, known = copied(graph)
    _divide(new, known[means[0]])
    return new


def _is_mean(node: fx.Node) -> bool:
    """Of tokens that all weigh the same: cross_entropy_loss(logits, labels, weight, reduction, ignored, smoothing)."""
    options: list[Any] = [*node.args[2:], *(None, MEAN, None, 0.0)[len(node.args) - 2 :]]
    weight, reduction, _, smoothing = options
    return weight is None and reduction == MEAN and not smoothing and not node.kwargs


def _takes_count(model: nn.Module) -> bool:
    """Trainer's own question, and whether the number has an effect."""
    own = getattr(model, "accepts_loss_kwargs", None)
    kinds = (parameter.kind for parameter in inspect.signature(model.forward).parameters.values())
    asked = inspect.Parameter.VAR_KEYWORD in kinds if own is None else bool(own)
    try:
        return asked and PASSED_ON.search(inspect.getsource(type(model).forward)) is not None
    except (OSError, TypeError):  # there is no source
        return False


def _divide(graph: fx.Graph, mean: fx.Node) -> None:
    last = list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(last):
        items = graph.placeholder(NAME)
    with fake_mode(graph):
        items.meta["val"] = torch.empty((), dtype=torch.int64, device=mean.meta["val"].device)
    logits, labels, *rest = mean.args
    options: list[Any] = [*rest, *(None, MEAN)[len(rest) :]]
    options[1] = SUM
    mean.args = (logits, labels, *options)
    with graph.inserting_after(mean):
        divided = graph.call_function(aten.div.Tensor, (mean, items))
    divided.meta = dict(mean.meta)
    mean.replace_all_uses_with(divided, delete_user_cb=lambda user: user is not divided)
