"""How a compiled model is called: arguments to placeholders, output leaves to what the base model returns."""

from __future__ import annotations

import inspect
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from peftc.capture.errors import NoRoom
from peftc.capture.examples.settled import Settled
from peftc.capture.texts import SAYINGS, with_positions
from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.ir import copied, drop_unread

# What a caller may pass although the graph has no input for it: the compiled model already behaves so.
HARMLESS = {
    "return_dict": True, "use_cache": False, "output_attentions": False, "output_hidden_states": False,
}  # fmt: skip
# An input that may be left out, and what it is then made of the model's main input. A mask is not where positions are
# given: without one a model reads off these which tokens are of one text.
FILLED_IN = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}
LOSS_INPUTS = ("labels",)


@dataclass(frozen=True)
class Convention:
    """The inputs by name, in order, and the shape of the result.

    room         an input, and how long it may be
    consistency  weight of a loss between two passes of a training step; 0 for one pass
    others       what the base model's forward takes beside the inputs: a call with it is for another graph
    settled      what a call says that no graph reads
    """

    inputs: tuple[str, ...]
    result: pytree.TreeSpec
    room: tuple[str, int] | None = None
    consistency: float = 0.0
    others: tuple[str, ...] = ()
    settled: Settled = field(default_factory=Settled)

    @property
    def signature(self) -> inspect.Signature:
        """What `inspect.signature(model.forward)` says, which Trainer chooses a data set's columns by.

        A column that is not named here is dropped without a word: so all are that the base model would be given.
        """
        optional = {*FILLED_IN, *LOSS_INPUTS}
        needed = [place for place, name in enumerate(self.inputs) if name not in optional]
        first = next((place for place, name in enumerate(self.inputs) if name in optional), len(self.inputs))
        late = next((place for place in needed if place > first), len(self.inputs))  # Python wants these by name
        return inspect.Signature(
            [
                inspect.Parameter(
                    name,
                    inspect.Parameter.POSITIONAL_OR_KEYWORD if place < late else inspect.Parameter.KEYWORD_ONLY,
                    default=None if name in optional else inspect.Parameter.empty,
                )
                for place, name in enumerate(self.inputs)
            ]
            + [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in self.others]
        )

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a call gives, by name, less what changes nothing.

        Raises:
            TypeError: on more than there is a place for, or twice the same.
            PeftcError: `texts-disagree` where it contradicts itself on which tokens are one text.
        """
        given = dict(zip(self.inputs, args, strict=False))
        if len(args) > len(self.inputs) or given.keys() & kwargs.keys():
            raise TypeError(f"the compiled model takes {', '.join(self.inputs)}, each once")
        given |= {name: value for name, value in kwargs.items() if not _is_harmless(name, value)}
        given = self.settled.with_positions({name: value for name, value in given.items() if value is not None})
        return with_positions(given, self.inputs[0]) if given.keys() & SAYINGS - set(self.inputs) else given

    def takes(self, given: Mapping[str, Any]) -> bool:
        """Whether this graph is for inputs of these names."""
        return self._lacking(given) is None

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The inputs by name; left out are only labels.

        Raises:
            TypeError: on a missing input, or one that the graph does not have.
            PeftcError: `no-room` where the model has no positions for both the prompt and the input.
        """
        named = self.named(args, kwargs)
        if (reason := self._lacking(named)) is not None:
            raise TypeError(reason)
        given = self._filled(named)
        if self.room and given[self.room[0]].shape[1] > self.room[1]:
            raise PeftcError(NoRoom(given=given[self.room[0]].shape[1], room=self.room[1]))
        return {name: given[name] for name in self.inputs if name in given}

    def _filled(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """With what is made of the main input, tokens, where it is left out."""
        given = self.settled.without_sizes(given)
        main = given.get(self.inputs[0])
        if not isinstance(main, Tensor) or main.is_floating_point():
            return dict(given)
        wanting = {name for name in FILLED_IN if name in self.inputs and name not in given}
        if "position_ids" in given:
            wanting.discard("attention_mask")
        return {**given, **{name: FILLED_IN[name](main) for name in wanting}}

    def _lacking(self, given: Mapping[str, Any]) -> str | None:
        """Why this graph is not for a call with what it says."""
        if lacking := self.settled.lacks(given):
            return f"the compiled model needs {', '.join(lacking)}"
        return self._misfit(self._filled(given))

    def _misfit(self, given: Mapping[str, Any]) -> str | None:
        """Why this graph is not for such inputs."""
        if unknown := given.keys() - set(self.inputs):
            return (
                f"the compiled model has no input {', '.join(sorted(unknown))}; it takes {', '.join(self.inputs)} "
                "(pass example= to compile it with others)"
            )
        missing = [name for name in self.inputs if name not in given and name not in LOSS_INPUTS]
        return f"the compiled model needs {', '.join(missing)}" if missing else None

    def unflatten(self, leaves: tuple[Any, ...], *, with_loss: bool) -> Any:
        """The base model's kind of result, such as a `CausalLMOutputWithPast`."""
        if with_loss or not self.keys:
            return pytree.tree_unflatten(leaves, self.result)
        assert self.result.type is not None
        subspecs = [spec for key, spec in zip(self.keys, self.result.children(), strict=True) if key != "loss"]
        values, start = [], 0
        for spec in subspecs:
            values.append(pytree.tree_unflatten(leaves[start : start + spec.num_leaves], spec))
            start += spec.num_leaves
        keys = [key for key in self.keys if key != "loss"]
        return self.result.type(**dict(zip(keys, values, strict=True)))

    @property
    def logits(self) -> tuple[int, ...]:
        """Which leaves hold logits, behind the loss."""
        return tuple(place for place, key in enumerate(self.keys) if key.endswith("logits"))

    @property
    def has_loss(self) -> bool:
        """Whether the first thing returned is a loss."""
        return has_loss(self.result)

    @property
    def keys(self) -> list[str]:
        """The names of a `ModelOutput`'s fields that are there; none for another kind of result."""
        return fields_of(self.result)


def others_of(model: nn.Module, inputs: Container[str]) -> tuple[str, ...]:
    """The names of what a model's forward takes beside `inputs`."""
    _, *parameters = inspect.signature(type(model).forward).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(each.name for each in parameters if each.kind not in kinds and each.name not in inputs)


def _is_harmless(name: str, value: Any) -> bool:
    return name in HARMLESS and value == HARMLESS[name] and not isinstance(value, Tensor)


def without_loss(graph: fx.Graph, result: pytree.TreeSpec) -> fx.Graph | None:
    """The graph for a call without labels: the same nodes less those that only the loss needs.

    None where the logits themselves depend on the labels, as where decoder inputs are made of them.
    """
    if not has_loss(result):
        return None
    leaves = graph.output_node().args[0]
    assert isinstance(leaves, tuple)
    return without_labels(graph, leaves[1:])


def without_labels(graph: fx.Graph, leaves: tuple[Any, ...]) -> fx.Graph | None:
    """A graph of its own that returns `leaves` and has no input for labels; None where they depend on the labels."""
    pruned, known = copied(graph)
    pruned.output_node().args = (fx.map_arg(leaves, known.__getitem__),)
    size_by_others(pruned, {node for node in pruned.find_nodes(op="placeholder") if node.target in LOSS_INPUTS})
    drop_unread(pruned)
    for node in pruned.find_nodes(op="placeholder"):
        if node.target in LOSS_INPUTS:
            if node.users:
                return None
            pruned.erase_node(node)
    return pruned


def size_by_others(graph: fx.Graph, instead_of: Container[fx.Node]) -> None:
    """A size that is read off some inputs, such as how many examples there are, is read off another that shares it."""
    known: dict[Any, tuple[fx.Node, int]] = {}
    for node in graph.find_nodes(op="placeholder"):
        given = node.meta.get("val")
        if node not in instead_of and isinstance(given, Tensor):
            for place, size in enumerate(given.shape):
                known.setdefault(_symbol(size), (node, place))
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        source, size = node.args[0], _symbol(node.meta.get("val"))
        if source in instead_of and size is not None:
            node.args = known.get(size, node.args)


def _symbol(size: Any) -> Any:
    """What a size is called that is not the same in every call; None for one that is."""
    return size.node.expr if isinstance(size, torch.SymInt) else None


def fields_of(result: pytree.TreeSpec) -> list[str]:
    """The names of a `ModelOutput`'s fields that are there; none for another kind of result."""
    kind = result.type
    return list(result.context) if isinstance(kind, type) and issubclass(kind, dict) else []


def has_loss(result: pytree.TreeSpec) -> bool:
    """Whether the first thing returned is a loss."""
    return fields_of(result)[:1] == ["loss"]


def loss_node(graph: fx.Graph, result: pytree.TreeSpec) -> fx.Node | None:
    """The loss that the graph returns; None for a model that returns none."""
    leaves = graph.output_node().args[0]
    first = leaves[0] if has_loss(result) and isinstance(leaves, tuple | list) else None
    return first if isinstance(first, fx.Node) else None
