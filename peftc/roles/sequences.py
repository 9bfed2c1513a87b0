"""Graph -> the sequences that prompts can be put into, by data flow from the graph's inputs.

Of the inputs only the names that transformers fixes for all models mean something here (`input_ids`,
`attention_mask`, `position_ids`, `token_type_ids`, `labels`); what is looked up, compared and padded is read off the
graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from peftc.capture.cached import KEPT
from peftc.capture.capture import Captured
from peftc.graph.ir import is_tensor, module_path, value
from peftc.protocol.site import Sequence
from peftc.roles.images import image_sequence
from peftc.roles.limits import position_limit
from peftc.roles.products import parameter_of
from peftc.roles.stacks import BlockPath

aten = torch.ops.aten

# What may stand between an input and the table it is looked up in.
SAME_TOKENS = {
    aten.view.default, aten.reshape.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.alias.default,
    aten.contiguous.default, aten.clone.default, aten.slice.Tensor,
}  # fmt: skip
COMPARISONS = {aten.eq.Scalar, aten.ne.Scalar}
LOSSES = {aten.cross_entropy_loss.default, aten.nll_loss_nd.default, aten.nll_loss.default}
# Inputs with an entry a token, and the entry of a prompt's token.
PER_TOKEN = {"attention_mask": 1, "token_type_ids": 0}
TOKENS, LABELS, POSITIONS, MASK, IGNORED = "input_ids", "labels", "position_ids", "attention_mask", -100


def find_sequences(captured: Captured, blocks: list[BlockPath]) -> tuple[Sequence, ...]:
    """The model's input sequence: of an encoder-decoder model, the encoder's. Empty where there is none to be found."""
    inputs = {str(node.target): node for node in captured.module.graph.find_nodes(op="placeholder")}
    looked_up = {name: list(_lookups(node)) for name, node in inputs.items() if _counts_tokens(node)}
    tables = {name: found for name, found in looked_up.items() if found}
    if not tables:
        found = image_sequence(captured, blocks)
        return (found,) if found else ()
    tokens = TOKENS if TOKENS in tables else max(tables, key=lambda name: _rows(tables[name][0]))
    return (_TokenSequence(captured, inputs, tokens, tables[tokens]).sequence(),)


def _counts_tokens(node: fx.Node) -> bool:
    return is_tensor(node) and not value(node).is_floating_point() and value(node).dim() == 2


def _same_tokens(start: fx.Node) -> Iterator[fx.Node]:
    """`start` and what has the same entries in another shape or type."""
    queue = [start]
    while queue:
        node = queue.pop()
        yield node
        queue += [user for user in node.users if user.target in SAME_TOKENS and user.args[0] is node]


def _lookups(tokens: fx.Node) -> Iterator[fx.Node]:
    """Where the tokens are the index into a table."""
    for node in _same_tokens(tokens):
        yield from (user for user in node.users if user.target is aten.embedding.default and user.args[1] is node)


def _rows(lookup: fx.Node) -> int:
    table = lookup.args[0]
    assert isinstance(table, fx.Node)
    return int(value(table).shape[0])


class _TokenSequence:
    """The sequence of one token input."""

    def __init__(self, captured: Captured, inputs: dict[str, fx.Node], tokens: str, lookups: list[fx.Node]) -> None:
        self.captured = captured
        self.inputs = inputs
        self.tokens = tokens
        self.lookups = lookups
        self.length = value(inputs[tokens]).shape[1]
        self.obstacles: list[str] = []

    def sequence(self) -> Sequence:
        lookup = self.lookups[0]
        weight = parameter_of(lookup.args[0])
        filler = self._filler()
        filled = ((self.tokens, filler), *self._filled())
        entry = self._entry(lookup)
        positions = self.inputs.get(POSITIONS)
        if weight is None:
            self.obstacles.append("the table of its tokens is no parameter")
        if len(self.lookups) > 1:
            self.obstacles.append(f"{self.tokens} is looked up in {len(self.lookups)} tables")
        if isinstance(self.length, int):
            self.obstacles.append(f"it was captured with a fixed length of {self.length}")
        return Sequence(
            "sequence", "sequence", frozenset(), parameters=(weight[0],) if weight else (),
            width=int(value(entry).shape[-1]), vocabulary=_rows(lookup), tokens=self.tokens, filled=filled,
            positions=position_limit(self.captured.module, self.inputs, self.tokens, filler),
            position_ids=POSITIONS if positions is not None else None, mask=MASK if MASK in self.inputs else None,
            obstacle=self.obstacles[0] if self.obstacles else None, embeddings=entry, tokenize=self._tokenize,
        )  # fmt: skip

    def _entry(self, lookup: fx.Node) -> fx.Node:
        """The last node of the embedding's own module: some scale what they look up, before others may give theirs."""
        node, path = lookup, module_path(lookup)
        while path and len(node.users) == 1 and self._is_leaf(path):
            (user,) = node.users
            if module_path(user) != path or not is_tensor(user):
                break
            node = user
        return node

    def _is_leaf(self, path: str) -> bool:
        return not any(True for _ in self.captured.model.get_submodule(path).children())

    def _filler(self) -> int:
        """A token that nothing in the graph asks for, such as padding or an end token: the prompt's stand-in."""
        asked = {
            user.args[1] for node in _same_tokens(self.inputs[self.tokens]) for user in node.users
            if user.target in COMPARISONS
        }  # fmt: skip
        return next(token for token in range(len(asked) + 1) if token not in asked)

    def _filled(self) -> Iterator[tuple[str, int]]:
        """The other inputs with an entry a token; what cannot be filled is an obstacle."""
        for name, node in self.inputs.items():
            if name == self.tokens or not is_tensor(node):
                continue
            if name in PER_TOKEN and value(node).dim() == 2:
                yield name, PER_TOKEN[name]
            elif name == LABELS and self._labels_follow():
                yield name, IGNORED
            elif name == POSITIONS and value(node).dim() == 2:
                continue
            elif name not in (LABELS, KEPT) and self._counts(node):
                self.obstacles.append(f"what its input {name} is for a prompt is not known")

    def _counts(self, node: fx.Node) -> bool:
        """Whether an input has an entry a token, or numbers that may be places of tokens."""
        fake = value(node)
        return any(str(size) == str(self.length) for size in fake.shape[1:]) or (
            fake.dim() == 1 and not fake.is_floating_point()
        )

    def _labels_follow(self) -> bool:
        """Whether there is a label a token: where the logits, which stand behind the loss, have a row a token."""
        (output,) = self.captured.module.graph.find_nodes(op="output")
        leaves = [leaf for leaf in output.args[0] if isinstance(leaf, fx.Node) and is_tensor(leaf)]
        if value(self.inputs[LABELS]).dim() < 2 or len(leaves) < 2 or not self._has_length(leaves[1]):
            return False
        if not any(node.target in LOSSES for node in self.captured.module.graph.nodes):
            self.obstacles.append("its loss has no label that leaves a token out")
        return True

    def _has_length(self, node: fx.Node) -> bool:
        return value(node).dim() > 1 and str(value(node).shape[1]) == str(self.length)

    def _tokenize(self, text: str) -> list[int] | None:
        """The tokens of `text` by the tokenizer from where the model came from; None where there is none."""
        source: Any = getattr(getattr(self.captured.model, "config", None), "_name_or_path", None)
        if not source:
            return None
        from transformers import AutoTokenizer

        try:
            return list(AutoTokenizer.from_pretrained(source, trust_remote_code=False)(text)["input_ids"])
        except Exception:  # libraries that read what others wrote raise anything
            return None
