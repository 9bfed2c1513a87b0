"""Which values of a captured graph count tokens, told by what they are made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from peftc.graph.ir import expression, get_attribute, is_tensor, value
from peftc.graph.rows import hint, on_cpu, path_between
from peftc.protocol.site import Attention, Sublayer

aten = torch.ops.aten

ARANGES = {aten.arange.default, aten.arange.start, aten.arange.start_step}
TOKEN_TESTS: dict[Any, bool] = {aten.ne.Scalar: True, aten.eq.Scalar: False}


def tokens_of(site: Attention) -> Any:
    """How many keys the attention sees: an expression in the graph's symbols, or a number."""
    assert site.pattern is not None
    count = value(site.pattern.k).shape[-2 if site.pattern.scores is None else -1]
    return expression(count)


def token_test(node: fx.Node) -> bool | None:
    """What `node`, which compares token ids with one id such as the padding's, says of a token that is not that."""
    source = node.args[0] if node.args else None
    if isinstance(source, fx.Node) and source.op == "placeholder":
        return TOKEN_TESTS.get(node.target)
    return None


class Counting:
    """Which values of a graph count tokens, and which are about what the tokens are (`hidden`)."""

    def __init__(self, graph: fx.Graph) -> None:
        self.hidden: set[fx.Node] = set()
        self.counted: set[fx.Node] = set()
        for node in graph.nodes:
            if is_size(node):
                continue
            if self._is_hidden(node):
                self.hidden.add(node)
            elif _is_source(node) or any(argument in self.counted for argument in node.all_input_nodes):
                self.counted.add(node)

    def _is_hidden(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return is_tensor(node) and value(node).is_floating_point()
        looked_up = node.target is aten.embedding.default and node.args[1] not in self.counted
        return looked_up or any(argument in self.hidden for argument in node.all_input_nodes)

    def is_bias(self, node: fx.Node) -> bool:
        """Whether a mask says more than who sees whom: something of positions, past any comparison."""
        queue, seen = [node], {node}
        while queue:
            current = queue.pop()
            if not is_tensor(current) or value(current).dtype == torch.bool:
                continue
            if _is_source(current) and current in self.counted:
                return True
            queue += [argument for argument in current.all_input_nodes if argument not in seen]
            seen.update(current.all_input_nodes)
        return False


def _is_source(node: fx.Node) -> bool:
    """Whether a value starts to count here."""
    if node.target in ARANGES:
        return any(isinstance(argument, fx.Node) for argument in node.args)
    if node.target is aten.slice.Tensor:
        source, *bounds = node.args
        return isinstance(source, fx.Node) and source.op == "get_attr" and any(isinstance(b, fx.Node) for b in bounds)
    return node.target is aten.cumsum.default


def is_size(node: fx.Node) -> bool:
    """Whether a node only asks another one's size, and so nothing of its values."""
    return node.target is aten.sym_size.int


def stream(sites: Iterable[Attention], every: Iterable[Attention]) -> set[fx.Node]:
    """What the operands of `sites` are made of, but for what cross attentions among `every` bring in from elsewhere."""
    foreign = {
        (node, operand)
        for site in every
        if site.cross and (pattern := site.pattern)
        for node, operand in (((pattern.scores or pattern.out), pattern.k), (pattern.out, pattern.v))
    }
    patterns = [site.pattern for site in sites if site.pattern]
    queue = [operand for pattern in patterns for operand in (pattern.q, pattern.k, pattern.v)]
    seen = set(queue)
    while queue:
        node = queue.pop()
        for argument in node.all_input_nodes:
            if argument not in seen and (node, argument) not in foreign:
                seen.add(argument)
                queue.append(argument)
    return seen


def core(site: Attention) -> set[fx.Node]:
    """The nodes of the attention itself, from the scores to its result."""
    pattern = site.pattern
    assert pattern is not None
    if pattern.scores is None:
        return {pattern.out}
    return {pattern.scores, *path_between(pattern.scores, pattern.out)}


def with_limits(module: fx.GraphModule, modules: list[Sublayer]) -> list[Sublayer]:
    """`modules`, with the attentions knowing how many tokens the tables of positions go up to.

    Found by asking for one token more than a table has rows: the first that falls off says where it ends.
    """
    every = [site for site in modules if isinstance(site, Attention)]
    by_tokens: dict[Any, list[Attention]] = defaultdict(list)
    for site in every:
        if not site.cross and not isinstance(tokens_of(site), int):
            by_tokens[tokens_of(site)].append(site)
    counting, limits = Counting(module.graph), {}
    for tokens, sites in by_tokens.items():
        inside = stream(sites, every)
        found = [_limit(module, node, tokens) for node in module.graph.nodes if node in counting.counted & inside]
        limits[tokens] = min((limit for limit in found if limit is not None), default=None)
    return [
        replace(site, positions=limits.get(tokens_of(site))) if isinstance(site, Attention) and not site.cross else site
        for site in modules
    ]


def _limit(module: fx.GraphModule, node: fx.Node, tokens: Any) -> int | None:
    if node.target is aten.slice.Tensor and _is_source(node):
        source, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
        assert isinstance(source, fx.Node)
        assert isinstance(dim, int)
        return int(value(source).shape[dim])
    if node.target is aten.embedding.default:
        table, index = node.args[:2]
        assert isinstance(table, fx.Node)
        assert isinstance(index, fx.Node)
        rows = int(value(table).shape[0])
        try:
            looked_up = evaluated(module, index, tokens, rows + 1)
        except RuntimeError:  # positions that are cut off a buffer, which has no more
            looked_up = None
        if looked_up is None:
            return rows
        off = ((looked_up >= rows) | (looked_up < 0)).reshape(-1, looked_up.shape[-1]).any(0).nonzero()
        return int(off[0]) if len(off) else None
    return None


def evaluated(module: fx.GraphModule, node: fx.Node, tokens: Any, count: int) -> torch.Tensor | None:
    """A counting value for a full sequence of `count` tokens; None where it depends on tensors without data."""

    @cache
    def run(current: fx.Node) -> Any:
        fake = current.meta.get("val")
        if not isinstance(fake, torch.Tensor):
            return count if expression(fake) == tokens else hint(fake)
        test = token_test(current)
        if current.op == "placeholder" or test is not None:
            shape = [count if expression(size) == tokens else hint(size) for size in fake.shape]
            return torch.ones(shape, dtype=fake.dtype) if test is None else torch.full(shape, test)
        if current.op == "get_attr":
            return get_attribute(module, str(current.target))
        args, kwargs = fx.map_arg((current.args, current.kwargs), run)
        assert callable(current.target)
        return current.target(*on_cpu(args), **on_cpu(kwargs))

    found = run(node)
    assert isinstance(found, torch.Tensor)
    return None if found.is_meta or isinstance(found, FakeTensor) else found
