"""The model without its head, for who computes the loss from hidden states and the head's weight, as TRL does."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from transformers.modeling_outputs import BaseModelOutput

from peftc.capture.convention import LOSS_INPUTS, without_labels
from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.ir import get_attribute
from peftc.planning.plan import extension
from peftc.rewrite.penalties import penalised
from peftc.runtime.errors import OwnLoss, WithoutHead
from peftc.runtime.holder import Holder

aten = torch.ops.aten


class Backbone:
    """What a compiled model makes of its inputs before the head: called as the base model is."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        """[batch, tokens, width] as `last_hidden_state`, with its gradients.

        Raises:
            PeftcError: `without-head` where a method is at the head; `own-loss` where the loss that a method asks for
                would be lost.
        """
        compiled = self._compiled
        methods = [binding.method.name for binding in penalised(compiled.plan)]
        if compiled.training and (methods or compiled.plan.consistency):
            raise PeftcError(OwnLoss(model=compiled.plan.sites.model, method=(methods or ["mixture"])[0]))
        module, given = compiled.routed(args, {name: v for name, v in kwargs.items() if name not in LOSS_INPUTS})
        (hidden,) = module.entries.part(hidden_graph, module)(module, *given.values())
        front = 0 if compiled.config.is_encoder_decoder else extension(compiled.plan.bindings)
        return BaseModelOutput(last_hidden_state=hidden[:, front:])


def hidden_graph(module: Holder) -> fx.Graph:
    """The graph as far as the input of the head."""
    names = _names(module)
    heads = [node for node in module.graph.nodes if _is_head(node, names)]
    if len(heads) == 1 and heads[0].target is aten.linear.default:
        found = without_labels(module.graph, heads[0].args[:1])
        if found is not None:
            return found
    raise PeftcError(WithoutHead(model=module.plan.sites.model))


def head(module: Holder) -> nn.Module | None:
    """The base model's head over the compiled model's tensors; None for a model that has none."""
    names = _names(module)
    if not names:
        return None
    shown = nn.Linear(1, 1, bias=False, device="meta")
    weight = get_attribute(module, sorted(names)[0])
    shown.weight = weight
    own: Any = module.base.get_output_embeddings()  # type: ignore[operator]
    if getattr(own, "bias", None) is not None:
        biases = [name for name, tensor in module.base.named_parameters() if tensor is own.bias]
        shown.bias = get_attribute(module, biases[0])
    shown.out_features, shown.in_features = weight.shape
    return shown


def _names(module: Holder) -> set[str]:
    """The names of the head's weight in the compiled model."""
    find = getattr(module.base, "get_output_embeddings", None)
    found = find() if find else None
    weight = getattr(found, "weight", None)
    known = module.base.named_parameters(remove_duplicate=False)
    return {name for name, tensor in known if tensor is weight}


def _is_head(node: fx.Node, names: set[str]) -> bool:
    is_lookup = node.target is aten.embedding.default
    return not is_lookup and any(source.op == "get_attr" and source.target in names for source in node.all_input_nodes)
