"""Where the table of tokens is read: looked up by the input's ids, or as the head that it is tied to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from peftc.protocol import Lazy, fx, torch
from peftc.protocol.site import Site
from peftc.protocol.sites import site

if TYPE_CHECKING:
    from peftc.graph import ir
else:
    ir = Lazy("peftc.graph.ir")


@cache
def _words() -> tuple[set[Any], set[Any], set[Any]]:
    """What counts, what of its operand reads no number but only how large it is, and what takes numbers of its first.

    What is counted, such as positions, is no token. What numbers are taken by is no part of what comes out.
    """
    aten = torch.ops.aten
    counting = {aten.arange.default, aten.arange.start, aten.arange.start_step, aten.cumsum.default}
    of_a_size = {
        aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
        aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
    }  # fmt: skip
    taking = {aten.gather.default, aten.index_select.default, aten.index.Tensor, aten.take_along_dim.default}
    return counting, of_a_size, taking


@site
@dataclass(frozen=True, eq=False, repr=False)
class Vocabulary(Site):
    """One reading of a table [tokens, width]: `node` is the lookup of `x`, ids, or the head's product with `x`."""

    tokens: int = 0
    width: int = 0
    is_head: bool = False
    x: fx.Node | None = None
    node: fx.Node | None = None

    kind = "vocabulary"
    own_roles: ClassVar = ("vocabulary",)
    fields: ClassVar = ("tokens", "width")
    noun, nouns, written = "a vocabulary's table", "tables of tokens", "vocabulary"

    def facts(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "width": self.width, "is_head": int(self.is_head)}

    @classmethod
    def find(cls, module: fx.GraphModule, names: Mapping[str, list[str]]) -> Iterator[Site]:
        aten = torch.ops.aten
        found = [
            node for node in module.graph.find_nodes(op="call_function", target=aten.embedding.default)
            if _is_table(node.args[0]) and _is_of_tokens(node.args[1])
        ]  # fmt: skip
        most = max((len(ir.value(node.args[0])) for node in found), default=0)  # kinds of segments are given, too
        found = [node for node in found if len(ir.value(node.args[0])) == most]
        tables = {str(node.args[0].target) for node in found}
        heads = [
            node for node in module.graph.find_nodes(op="call_function", target=aten.linear.default)
            if _is_table(node.args[1]) and str(node.args[1].target) in tables
        ]  # fmt: skip
        times: Counter[str] = Counter()  # a table may be read more than once
        for node in (*found, *heads):
            path = ir.module_path(node)
            times[path] += 1
            name = f"{path}.rows" if times[path] == 1 else f"{path}.rows_{times[path]}"
            yield cls._at(name, node, is_head=node in heads)

    @classmethod
    def _at(cls, name: str, node: fx.Node, *, is_head: bool) -> Site:
        operands: Any = node.args
        table, x = operands[1::-1] if is_head else operands[:2]
        path, roles, (tokens, width) = ir.module_path(node), frozenset(cls.own_roles), ir.value(table).shape
        return cls(name, path, roles, None, None, None, (str(table.target),), tokens, width, is_head, x, node)

    @classmethod
    def samples(cls) -> tuple[Site, ...]:
        return tuple(
            cls("table.rows", "table", frozenset(cls.own_roles), tokens=99, width=8, is_head=is_head)
            for is_head in (False, True)
        )

    def reads(self) -> tuple[fx.Node, ...]:
        return () if self.x is None else (self.x,)

    def changes(self) -> tuple[fx.Node, ...]:
        return () if self.node is None else (self.node,)


def _is_table(operand: Any) -> bool:
    return isinstance(operand, fx.Node) and operand.op == "get_attr" and ir.is_tensor(operand)


def _is_of_tokens(ids: Any) -> bool:
    """Whether indices are made of an input's numbers, and not counted."""
    counting, of_a_size, taking = _words()
    seen, left, given = set(), [ids], False
    while left:
        node = left.pop()
        if not isinstance(node, fx.Node) or node in seen or not ir.is_tensor(node):
            continue
        if node.target in counting:
            return False
        seen.add(node)
        given |= node.op == "placeholder"
        if node.target not in of_a_size:
            left += node.args[:1] if node.target in taking else node.all_input_nodes
    return given
