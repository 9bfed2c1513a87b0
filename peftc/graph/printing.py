"""A graph in words: operator names, shapes with named dimensions, whole graphs, and what one pass changed.

Everything here is the same on every machine and in every run: no ids, no times, no folders.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from peftc.diagnostics.source import Span
from peftc.graph.ir import PROVENANCE, Provenance, module_path

_SYMBOL = re.compile(r"\b[su]\d+\b")
_TO_THE_END = 2**63 - 1
_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.bool: "bool", torch.complex64: "c64",
}  # fmt: skip

Dims = Mapping[str, str]


def plain(text: str) -> str:
    """The text on one line, with characters that could move or reorder it replaced by visible ones."""
    return "".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in " ".join(text.split()))


def place(span: Span) -> str:
    """`file.peft:3`, without the folder."""
    return f"{file_name(span)}:{span.line}"


def file_name(span: Span) -> str:
    """The name of the file a statement stands in, without its folder."""
    return plain(re.split(r"[\\/]", span.source.name)[-1])


def stamp(node: fx.Node) -> Provenance | None:
    """Who inserted `node`; None for what the model had."""
    found = node.meta.get(PROVENANCE)
    return found if isinstance(found, Provenance) else None


def short_name(node: fx.Node) -> str:
    """`linear` for `aten.linear.default`; an operator of a library outside ATen keeps its namespace."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        library, name = target._schema.name.split("::")
        return name if library in ("aten", "prims") else f"{library}.{name}"
    return str(getattr(target, "__name__", target))


def dim_names(graph: fx.Graph) -> dict[str, str]:
    """Names of symbolic sizes, from the inputs: a first dimension is `batch`, the second of the first one `seq`.

    Other inputs' lengths carry the input's name: `labels seq`.
    """
    names: dict[str, str] = {}
    for node in graph.find_nodes(op="placeholder"):
        fake = node.meta.get("val")
        shape = fake.shape if isinstance(fake, torch.Tensor) else ()
        for index, size in enumerate(shape[:2]):
            name = "batch" if index == 0 else "seq" if "seq" not in names.values() else f"{node.target} seq"
            if not isinstance(size, int) and _SYMBOL.fullmatch(str(size)):
                names.setdefault(str(size), name)
    return names


def shape_text(fake: Any, dims: Dims) -> str:
    """`[batch, seq, 576] f32` for a tensor, one such for each of a tuple's, '' for anything else."""
    if isinstance(fake, torch.Tensor):
        return f"[{', '.join(_size(size, dims) for size in fake.shape)}] {dtype_text(fake.dtype)}"
    if isinstance(fake, list | tuple):
        return ", ".join(filter(None, (shape_text(item, dims) for item in fake)))
    return ""


def dtype_text(dtype: torch.dtype) -> str:
    """`bf16` for `torch.bfloat16`."""
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def _size(size: Any, dims: Dims) -> str:
    """A size with its symbols named; a product in the order batch, sequence, the rest."""
    factors = str(size).split("*")
    if len(factors) > 1 and all(re.fullmatch(r"\w+", factor) for factor in factors):
        order = list(dims)
        factors.sort(key=lambda factor: order.index(factor) if factor in dims else len(order))
    return "·".join(_SYMBOL.sub(lambda found: dims.get(found[0], found[0]), factor) for factor in factors)


def as_text(graph: fx.Graph) -> str:
    """The graph, one node a line: parameters, inputs, then operations; inserted ones begin with `+` and say why."""
    dims = dim_names(graph)
    return "\n".join(_line(node, dims, "+" if stamp(node) else " ") for node in graph.nodes) + "\n"


def diff(before: fx.Graph, after: fx.Graph) -> str:
    """What one pass did, in the order of the graph: `+` inserted, `-` removed, `~` reads something else now.

    Nodes are the same if their names and targets are: a copy of a graph keeps both.
    """
    old = {node.name: node for node in before.nodes}
    kept = {node.name for node in after.nodes if node.name in old and node.target == old[node.name].target}
    removed = _removed(before, kept)
    dims, old_dims = dim_names(after), dim_names(before)
    lines: list[str] = []
    for node in after.nodes:
        if node.name not in kept:
            lines.append(_change(node, dims, "+"))
            continue
        lines += (_change(gone, old_dims, "-") for gone in removed.pop(node.name, ()))
        lines += _redirected(old[node.name], node)
    lines += (_change(gone, old_dims, "-") for rest in removed.values() for gone in rest)
    count = {sign: sum(line.startswith(sign) for line in lines) for sign in "+-~"}
    if not lines:
        return "no change\n"
    head = f"{count['+']} inserted, {count['-']} removed, {count['~']} changed"
    return "\n".join([head, *lines]) + "\n"


def _removed(before: fx.Graph, kept: set[str]) -> dict[str, list[fx.Node]]:
    """The nodes that went, under the name of the next one that stayed."""
    gone: dict[str, list[fx.Node]] = {}
    waiting: list[fx.Node] = []
    for node in before.nodes:
        if node.name not in kept:
            waiting.append(node)
        elif waiting:
            gone[node.name], waiting = waiting, []
    return gone | ({"": waiting} if waiting else {})


def _redirected(old: fx.Node, new: fx.Node) -> Iterator[str]:
    before, after = _arguments(old), _arguments(new)
    if before != after:
        where = module_path(new)
        text = f"{new.name} = {short_name(new)}({after}), was ({before})"
        yield f"~ {where}: {text.replace(f'{where}.', '')}" if where else f"~ {text}"


def _change(node: fx.Node, dims: Dims, sign: str) -> str:
    """One line of a diff, headed by the method and the site that a node serves."""
    if (found := stamp(node)) is None:
        return _line(node, dims, sign)
    body = f"{node.name} = {short_name(node)}({_arguments(node)})"
    if found.site:  # it is on the line already; that of the whole model has no name
        body = body.replace(f"{found.site.partition('[')[0]}.", "")
    head = f"{method_of(found)} {found.site}".rstrip()
    return f"{sign} {head}: {body} {shape_text(node.meta.get('val'), dims)}".rstrip()


def method_of(found: Provenance) -> str:
    """The method's name as its statement has it, else the pass."""
    words = re.match(r"(?:apply|quantize)\s+(\w+)", found.span.text) if found.span else None
    return words[1] if words and words[0].startswith("apply") else found.pass_name


def _line(node: fx.Node, dims: Dims, sign: str) -> str:
    shape = shape_text(node.meta.get("val"), dims)
    match node.op:
        case "get_attr":
            text = f"parameter {node.target}: {shape}" if shape else f"attribute {node.target}"
        case "placeholder":
            text = f"input {node.name}: {shape}"
        case "output":
            text = f"return {_arguments(node)}"
        case _:
            text = f"{node.name} = {short_name(node)}({_arguments(node)}) {shape}".rstrip()
    found = stamp(node)
    if found is None:
        return f"{sign} {text}"
    reasons = (found.pass_name, found.site, place(found.span) if found.span else "")
    return f"{sign} {text}  # {', '.join(filter(None, reasons))}"


def _arguments(node: fx.Node) -> str:
    given = [_value(item) for item in node.args] + [f"{name}={_value(item)}" for name, item in node.kwargs.items()]
    return ", ".join(given)


def _value(item: Any) -> str:
    """An argument: a node by its name, a parameter by its path, and torch's own values in short."""
    match item:
        case fx.Node():
            return str(item.target) if item.op == "get_attr" else item.name
        case list() | tuple():
            return f"[{', '.join(map(_value, item))}]"
        case dict():
            return f"{{{', '.join(f'{key}: {_value(value)}' for key, value in item.items())}}}"
        case slice():
            return ":".join("" if part is None else _value(part) for part in (item.start, item.stop, item.step))
        case torch.dtype():
            return dtype_text(item)
        case torch.device():
            return str(item)
        case int() if item == _TO_THE_END:
            return "end"
        case _:
            return plain(str(item)) if not isinstance(item, str) else repr(item)


class UniqueSuffixes:
    """Dotted paths by their last parts: as few as tell them apart from all others."""

    def __init__(self, paths: Mapping[str, str]) -> None:
        """`paths`: full path -> the path relative to what is drawn."""
        self._relative = dict(paths)
        self._owners: dict[str, set[str]] = defaultdict(set)
        for path, relative in self._relative.items():
            parts = relative.split(".")
            for count in range(1, len(parts) + 1):
                self._owners[".".join(parts[-count:])].add(path)

    def short(self, path: str, least: int = 2) -> str:
        """The name of `path`, of no fewer than `least` parts where it has so many."""
        parts = self._relative.get(path, path).split(".")
        for count in range(least, len(parts)):
            if self._owners[suffix := ".".join(parts[-count:])] == {path}:
                return suffix
        return ".".join(parts)
