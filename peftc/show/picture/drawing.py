"""What is drawn: nodes, edges, and the rules for what of a graph a reader wants to see."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Literal

import torch
from torch import fx

from peftc.diagnostics.source import Span
from peftc.graph.ir import STACK
from peftc.graph.printing import file_name, plain, short_name

MARK = re.compile(r"⟦[+-]?\d⟧")  # in a drawing that blocks share: the path of its block, or of one beside it

Kind = Literal["input", "output", "parameter", "operation"]

PLUMBING = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "transpose",
        "t",
        "permute",
        "movedim",
        "squeeze",
        "unsqueeze",
        "flatten",
        "unflatten",
        "expand",
        "expand_as",
        "view_as",
        "slice",
        "narrow",
        "select",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "tensor_split",
        "getitem",
        "contiguous",
        "clone",
        "alias",
        "detach",
        "detach_",
        "lift_fresh_copy",
        "to",
        "_to_copy",
        "type_as",
        "_assert_tensor_metadata",
    ]
)
_NEUTRAL = {"mul": 1, "div": 1, "add": 0, "sub": 0}


@dataclass(frozen=True, slots=True)
class Origin:
    """The statement a node comes from."""

    statement: str
    file: str
    line: int

    @property
    def place(self) -> str:
        """`qlora.peft:3`, or `line 3` of a spec that is no file."""
        return f"line {self.line}" if self.file.startswith("<") else f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class DrawnNode:
    """One node. `name` is the weight or site it is about.

    For the reader who asks: `notes` in words, `reads` the frozen weights that are part of it, `made` the pass that
    inserted it, `sites` the places of the model that it is about, `python` what it computes, in names of its block's
    own, `source` the line of the model that asks for it. `opens` is the block that a click goes on to.
    """

    id: str
    kind: Kind
    op: str
    name: str = ""
    shape: str = ""
    inserted: bool = False
    trainable: bool = False
    origins: tuple[Origin, ...] = ()
    notes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    made: str = ""
    sites: tuple[str, ...] = ()
    python: tuple[str, ...] = ()
    source: str = ""
    opens: str = ""
    folded: bool = False

    @property
    def label(self) -> str:
        """`linear q_proj.weight`."""
        return f"{self.op} {self.name}".strip()

    @property
    def statement(self) -> str:
        """The text of the statement it comes from, '' for what the model had."""
        return "; ".join(origin.statement for origin in self.origins)

    @property
    def line(self) -> int | None:
        """The statement's line."""
        return self.origins[0].line if self.origins else None


@dataclass(frozen=True, slots=True)
class DrawnEdge:
    """A tensor from one node to another, the operand it is there, and the plumbing it passes on its way."""

    source: str
    target: str
    argument: str = ""
    through: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Drawing:
    """A graph to look at, in the order of the forward pass."""

    title: str
    nodes: tuple[DrawnNode, ...]
    edges: tuple[DrawnEdge, ...]

    @property
    def inserted(self) -> int:
        """How many nodes peftc put there."""
        return sum(node.inserted for node in self.nodes)


@dataclass(frozen=True, slots=True)
class Flow:
    """One operand of a node, followed back through plumbing."""

    source: fx.Node
    argument: str
    through: tuple[str, ...]


@dataclass(eq=False)
class Cell:
    """The fx nodes that are drawn as one."""

    id: str
    nodes: list[fx.Node] = field(default_factory=list)
    block: str | None = None
    module: str = ""


def with_room(drawing: Drawing, name: str) -> Drawing:
    """The drawing with `name` in its labels where marks are, for a layout that has room for it."""
    nodes = (replace(node, op=MARK.sub(name, node.op), name=MARK.sub(name, node.name)) for node in drawing.nodes)
    return replace(drawing, nodes=tuple(nodes))


def joined(names: list[str]) -> str:
    """Several names as one: `{q,k,v}_proj.weight`."""
    if len(names) < 2:
        return "".join(names)
    start, end = _common(names), _common([name[::-1] for name in names])[::-1]
    middles = [name[len(start) : len(name) - len(end)] for name in names]
    return f"{start}{{{','.join(middles)}}}{end}" if all(middles) else ", ".join(names)


def _common(names: list[str]) -> str:
    """What all begin with, as far as a dot or an underscore."""
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    found = "".join(letters[0] for letters in alike)
    return found[: max(found.rfind("."), found.rfind("_")) + 1]


def origin_of(span: Span) -> Origin:
    """The statement at a span, on one line, and where it stands."""
    return Origin(plain(span.text), file_name(span), span.line)


def operands(node: fx.Node) -> Iterator[tuple[str, fx.Node]]:
    """The tensors among a node's arguments, each with the name of its parameter."""
    schema = getattr(node.target, "_schema", None)
    known = [argument.name for argument in schema.arguments] if schema else []
    named = [(known[i] if i < len(known) else "", item) for i, item in enumerate(node.args)]
    for name, item in (*named, *node.kwargs.items()):
        inner: list[fx.Node] = []
        fx.node.map_arg(item, inner.append)
        yield from ((name, found) for found in inner if carries_tensor(found))


def carries_tensor(node: fx.Node) -> bool:
    """Whether `node` is a tensor or several."""
    fake = node.meta.get("val")
    many = fake if isinstance(fake, list | tuple) else [fake]
    return any(isinstance(item, torch.Tensor) for item in many)


def is_plumbing(node: fx.Node) -> bool:
    """Whether `node` only moves or casts its first operand, or adds nothing to it, or multiplies it by one."""
    if node.op != "call_function" or not any(True for _ in operands(node)):
        return False
    name = short_name(node)
    if name in _NEUTRAL and len(node.args) == 2 and not node.kwargs:
        number = node.args[1]
        return isinstance(number, int | float) and number == _NEUTRAL[name]
    return name in PLUMBING


def plumbing_text(node: fx.Node) -> str:
    """What an edge says of a node it passes; nothing where everything is kept."""
    name = short_name(node)
    if name in _NEUTRAL:
        return ""
    if name == "slice" and node.args[2:4] == (0, 2**63 - 1):
        return ""
    return f"{name}{window(node)}" if name != "getitem" else f"part {node.args[1]}"


def window(node: fx.Node) -> str:
    """The range that a slice takes or writes, ` 32:64`."""
    match short_name(node), node.args:
        case "narrow", (_, _, int(start), int(length)):
            return f" {start}:{start + length}"
        case "slice", (_, _, int(start), int(end), *_):
            return f" {start}:{'' if end == 2**63 - 1 else end}"
        case "slice_scatter", (_, _, _, int(start), int(end), *_):
            return f" {start}:{end}"
    return ""


def class_name(node: fx.Node) -> str:
    """The class of the innermost module that made `node`."""
    stack = node.meta.get(STACK)
    return str(list(stack.values())[-1][1]).rpartition(".")[2] if stack else short_name(node)
