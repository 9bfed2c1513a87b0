"""What is drawn: nodes, edges, and the rules for what of a graph a reader wants to see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from peftc.diagnostics.source import Span
from peftc.graph.ir import STACK
from peftc.graph.printing import file_name, plain, short_name

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
    """One node. `name` is the weight or site it is about, `notes` are facts for the reader who asks."""

    id: str
    kind: Kind
    op: str
    name: str = ""
    shape: str = ""
    inserted: bool = False
    trainable: bool = False
    origins: tuple[Origin, ...] = ()
    notes: tuple[str, ...] = ()

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
