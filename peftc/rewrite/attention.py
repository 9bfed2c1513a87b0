"""Learned keys and values at an attention: in front of its own, under one softmax, or attended apart.

    in front:  y = softmax([q Pᵀ, q kᵀ]) [Q; v]        apart:  f(y, softmax(q Pᵀ) Q)

P and Q, keys and values, are what the method's `extend` makes. `spelt_out.py` does the same to an attention that is
no single operation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention

from peftc.graph.ir import Provenance, users_except, value
from peftc.graph.rows import path_between
from peftc.planning.plan import Binding
from peftc.protocol.method import Method
from peftc.protocol.operands import wanted
from peftc.protocol.site import Attention
from peftc.rewrite.positions import Positions, made
from peftc.rewrite.spelt_out import SpeltOut
from peftc.rewrite.splicer import TRAINING, Splicer, of_method
from peftc.rewrite.weights import dense_weight, take

FUSED = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def attend(splicer: Splicer, binding: Binding, positions: Positions, pass_name: str) -> None:
    """Puts the keys and values of one method at its attention."""
    Attender(splicer, binding, positions, Provenance(pass_name, binding.site.name, binding.span)).attend()


def heads_of(flat: Tensor, site: Attention, like: Tensor) -> Tensor:
    """[length, kv_heads * width] as an operand beside `like`: [batch, heads, length, width], heads as `like` has them.

    Where `like` has one leading dimension for batch and heads, so has the result.
    """
    own = len(site.groups)
    heads: Tensor = flat.unflatten(-1, (site.kv_heads, -1)).transpose(0, 1)  # [kv_heads, length, width]
    copies = own // site.kv_heads
    if site.groups != tuple(range(own)):
        in_a_row = site.groups == tuple(head for head in range(site.kv_heads) for _ in range(copies))
        heads = heads.repeat_interleave(copies, 0) if in_a_row else torch.stack([heads[head] for head in site.groups])
    heads = heads.to(like.dtype).unsqueeze(0)
    if like.dim() == 4:
        return heads.expand(like.shape[0], -1, -1, -1)
    return heads.expand(like.shape[0] // own, -1, -1, -1).flatten(0, 1)


class Attender:
    """One method at one attention."""

    def __init__(self, splicer: Splicer, binding: Binding, positions: Positions, stamp: Provenance) -> None:
        assert isinstance(binding.site, Attention)
        assert binding.site.pattern is not None
        self.splicer = splicer
        self.graph = splicer.graph
        self.binding = binding
        self.method: Method = binding.method
        self.site = binding.site
        self.pattern = binding.site.pattern
        self.positions = positions
        self.stamp = stamp
        self.asked = self.method.asks_extend(tuple(binding.names))
        self.operands = self._operands(self.asked)

    def attend(self) -> None:
        apart = self.method.attends_apart
        plain = self._plain() if self.method.has_gate else None
        if self.pattern.scores is None:
            self._fused_apart() if apart else self._fused_in_front()
        else:
            keys, values = self._keys_and_values(self.pattern.scores)
            current = self.splicer.current
            spelt = SpeltOut(self.binding, self.pattern, keys, values, self.positions, current, self.stamp)
            if apart:
                self._rewritten(spelt.apart())
            else:
                spelt.in_front()
        if not apart:
            self.positions.take(self.site, self.method.takes_positions(self.site))
        if plain is not None:
            self._gated(plain, self._result())

    def _result(self) -> fx.Node:
        """What the attention gives, with all that was done to it before."""
        return self.splicer.current.get(self.pattern.out, self.pattern.out)

    def _plain(self) -> fx.Node:
        """The attention's result once more, for what is about to be done to it not to change."""
        start, out = self.pattern.softmax, self._result()
        copies: dict[fx.Node, fx.Node] = {}
        for node in [out] if start is None else [start, *path_between(start, out)]:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda given: copies.get(given, given))
            copies[node] = made(self.graph, node.target, args, node, node, self.stamp, kwargs)
        return copies[out]

    def _gated(self, plain: fx.Node, changed: fx.Node) -> None:
        """Replaces the changed result by what the method lets through of the change."""
        assert self.site.entry is not None
        names = wanted(type(self.method).gate, 5)
        extra = self._operands(names)

        def function(x: Tensor, y: Tensor, changed: Tensor, *given: Tensor) -> Tensor:
            return self.method.gate(self.site, x, y, changed, **dict(zip(extra, given, strict=True)))

        readers = users_except(changed, [])
        args = [self.site.entry.x, plain, changed, *extra.values()]
        result = self._spliced(function, args, max(plain, changed), changed, "gated")
        for reader in readers:
            reader.replace_input_with(changed, result)
        self.splicer.current[self.pattern.out] = result

    # The fused operation

    def _fused_in_front(self) -> None:
        node = self.pattern.out
        q, k, v, mask, causal = (argument(node, name) for name in ("query", "key", "value", "attn_mask", "is_causal"))

        def longer(k: Tensor, v: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = self._heads(given, k, v)
            return torch.cat([keys, k], -2), torch.cat([values, v], -2)

        keys, values = self._spliced(longer, [k, v, *self.operands.values()], node.prev, node, "longer")
        count = int(value(keys).shape[-2] - value(k).shape[-2])
        if causal:
            mask = self._spliced(partial(_causal, count), [q, k], node.prev, node, f"causal {count}")
            set_argument(node, "is_causal", False)
        elif mask is not None:
            takes = self.method.takes_positions(self.site)
            there = value(k).shape[-2]
            mask = self.positions.widened(mask, there, self.site, count, takes, self.method.windowed, self.stamp)
        for name, now in {"key": keys, "value": values, "attn_mask": mask}.items():
            set_argument(node, name, now)

    def _fused_apart(self) -> None:
        node = self.pattern.out
        q, k, v = (argument(node, name) for name in ("query", "key", "value"))
        options: dict[str, Any] = {name: node.kwargs[name] for name in ("scale", "enable_gqa") if name in node.kwargs}

        def attended(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
            keys, values = self._heads(given, k, v)
            return scaled_dot_product_attention(q, keys, values, **options)

        self._rewritten(self._spliced(attended, [q, k, v, *self.operands.values()], node, node, f"apart {options}"))

    # What both kinds need

    def _keys_and_values(self, scores: fx.Node) -> tuple[fx.Node, fx.Node]:
        """As operands of an attention spelt out: [..., width, length] and [..., length, width]."""

        def shaped(k: Tensor, v: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = self._heads(given, k, v)
            return keys.transpose(-1, -2), values

        k, v = self.pattern.k, self.pattern.v
        found = self._spliced(shaped, [k, v, *self.operands.values()], max(k, v), scores, "shaped")
        return found[0], found[1]

    def _rewritten(self, attended: fx.Node) -> None:
        """Replaces the attention's result by what the method makes of it and of what it attended to apart."""
        y = self._result()
        names = self.method.asks(self.binding.names)
        extra = self._operands(names)

        def function(attended: Tensor, y: Tensor, *given: Tensor) -> Tensor:
            values = dict(zip(extra, given, strict=True))
            result: Tensor = self.method.rewrite(self.site, attended, y, **{name: values.get(name) for name in names})
            return result

        readers = users_except(y, [])
        result = self._spliced(function, [attended, y, *extra.values()], max(attended, y), y, "rewritten")
        for reader in readers:
            reader.replace_input_with(y, result)
        self.splicer.current[self.pattern.out] = result

    def _heads(self, given: tuple[Tensor, ...], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._extended(given)
        return heads_of(keys, self.site, k), heads_of(values, self.site, v)

    def _extended(self, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The method's keys and values from its tensors, and from the projections where it asks for them."""
        values: dict[str, Any] = dict(zip(self.operands, given, strict=True))
        for kind, layer in (("key", self.site.key), ("value", self.site.value)):
            index = values.pop(f"{kind}_rows", None)
            assert layer is not None
            if f"{kind}_weight" in values:
                values[f"{kind}_weight"] = dense_weight(values[f"{kind}_weight"], layer, index)
            if f"{kind}_bias" in values:
                values[f"{kind}_bias"] = take(values[f"{kind}_bias"], layer, 0, index)
        return self.method.extend(self.site, **{name: values.get(name) for name in self.asked})

    def _operands(self, names: tuple[str, ...]) -> dict[str, fx.Node]:
        """The nodes of the tensors asked for; a bias that the layer does not have is left out."""
        paths = {name: self.binding.names[name] for name in names if name in self.binding.names}
        for kind, layer in (("key", self.site.key), ("value", self.site.value)):
            assert layer is not None
            if f"{kind}_weight" in names:
                paths[f"{kind}_weight"] = layer.weight
            if f"{kind}_bias" in names and layer.bias:
                paths[f"{kind}_bias"] = layer.bias
        return (
            {name: self.splicer.operand(path) for name, path in paths.items()}
            | self._rows(names)
            | ({TRAINING: self.splicer.training()} if TRAINING in names else {})
        )

    def _rows(self, names: tuple[str, ...]) -> dict[str, fx.Node]:
        """The rows of fused weights that are asked for, as buffers, where they are no range."""
        found: dict[str, fx.Node] = {}
        for kind, layer in (("key", self.site.key), ("value", self.site.value)):
            assert layer is not None
            if f"{kind}_weight" in names and layer.rows is not None and layer.slice is None:
                found[f"{kind}_rows"] = self.splicer.index(f"{self.binding.path}.{kind}_rows", layer)
        return found

    def _spliced(
        self, function: Callable[..., Any], args: list[fx.Node], after: fx.Node, inside: fx.Node, name: str
    ) -> Any:
        """The nodes of `function`, traced once for each method, kind of site and shape: equal blocks share it."""
        layers = tuple(
            (layer.transposed, layer.rows, layer.bias is None) for layer in (self.site.key, self.site.value) if layer
        )
        facts = name, of_method(self.method, self.site, ()), self.site.groups, layers
        template = self.splicer.templates.get(function, facts, [value(node) for node in args])
        return self.splicer.splice(template, args, after, self.stamp, inside)[0]


def argument(node: fx.Node, name: str) -> Any:
    """An argument of the fused attention, wherever it was given."""
    place = FUSED.index(name)
    return node.args[place] if place < len(node.args) else node.kwargs.get(name)


def set_argument(node: fx.Node, name: str, now: Any) -> None:
    """Gives the fused attention another argument."""
    if FUSED.index(name) < len(node.args):
        node.update_arg(FUSED.index(name), now)
    elif now is not None or name in node.kwargs:
        node.update_kwarg(name, now)


def _causal(count: int, q: Tensor, k: Tensor) -> Tensor:
    """The mask that the fused attention means by `is_causal`, after `count` keys that everybody sees."""
    return q.new_ones(q.shape[-2], k.shape[-2] + count, dtype=torch.bool).tril(count)
