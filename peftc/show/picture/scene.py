"""A graph, read once for all the drawings of it: who computes what, what is followed through, what is what."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

from torch import fx

from peftc.diagnostics.source import Span
from peftc.graph.ir import block_of
from peftc.graph.printing import Dims, dim_names, plain
from peftc.planning.plan import Plan
from peftc.protocol.site import Attention, Block, Sublayer
from peftc.show.picture.drawing import Flow, is_plumbing, operands, plumbing_text

_NUMBER = re.compile(r"_\d+$")
_LINE = re.compile(r'File "(.*)", line (\d+), in [^\n]*\n *([^\n]*)')
_FOLDER = re.compile(r"[\\/]")


class Scene:
    """What every drawing of a graph reads off it. `detail` and `trained` as for `draw`."""

    def __init__(self, graph: fx.Graph, plan: Plan, *, detail: bool = False, trained: bool = True) -> None:
        self.graph, self.plan, self.detail = graph, plan, detail
        blocks = frozenset(plan.sites.blocks)
        self.owner = {node: block_of(node, blocks) for node in graph.nodes}
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.members: dict[str, list[fx.Node]] = defaultdict(list)
        for node, owner in self.owner.items():
            self.members[owner or ""].append(node)
        self.attributes = [str(node.target) for node in graph.find_nodes(op="get_attr")]
        self.trained: dict[str, Span] = plan.trained if trained else {}
        self.dims: Dims = dim_names(graph)
        self.state = {
            name: (binding.span, spec.trainable) for binding in plan.bindings for name, spec in binding.tensors.items()
        }
        self._paths = {f"{binding.path}.": binding.span for binding in plan.bindings}
        self._flows: dict[fx.Node, tuple[Flow, ...]] = {}
        self._skipped: dict[fx.Node, bool] = {}

    # Following tensors

    def skipped(self, node: fx.Node) -> bool:
        """Whether a node is part of the edges through it."""
        if node not in self._skipped:
            self._skipped[node] = not self.detail and is_plumbing(node)
        return self._skipped[node]

    def flows(self, node: fx.Node) -> tuple[Flow, ...]:
        """The tensors `node` reads, each followed to the node that is drawn for it."""
        if node not in self._flows:
            self._flows[node] = tuple(self._followed(node))
        return self._flows[node]

    def _followed(self, node: fx.Node) -> Iterator[Flow]:
        for argument, source in operands(node):
            through: list[str] = []
            while self.skipped(source):
                through.insert(0, plumbing_text(source))
                source = next(iter(operands(source)))[1]
            yield Flow(source, argument, tuple(text for text in through if text))

    def readers(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """The nodes that read one of `nodes`, through plumbing too, in the order of the graph."""
        waiting, found = list(nodes), set[fx.Node]()
        while waiting:
            for user in waiting.pop().users:
                if user not in found:
                    found.add(user)
                    if self.skipped(user):
                        waiting.append(user)
        return sorted(found, key=self.order.__getitem__)

    # What a tensor is

    def added(self, path: str) -> tuple[Span, bool] | None:
        """The statement behind a tensor the base model does not have, and whether it learns."""
        if path in self.state:
            return self.state[path]
        return next(((span, False) for prefix, span in self._paths.items() if path.startswith(prefix)), None)

    def is_beside(self, path: str) -> bool:
        """Whether a tensor is drawn by itself: it learns, or was inserted."""
        return path in self.trained or self.added(path) is not None

    @cached_property
    def content(self) -> frozenset[fx.Node]:
        """What depends on a weight: all that is computed of the positions of tokens alone is not in it."""
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            is_weight = node.op == "get_attr" and str(node.target) not in self.buffers
            if is_weight or node.op == "placeholder" or any(source in found for _, source in operands(node)):
                found.add(node)
        return frozenset(found)

    @cached_property
    def buffers(self) -> frozenset[str]:
        """The tensors of the base model that are no weights."""
        return frozenset(name for name, _ in self.plan.captured.model.named_buffers())

    # For the reader who asks

    @cached_property
    def _packed(self) -> dict[str, str]:
        return {f"{item.path}.": weight for weight, item in self.plan.packed.items()}

    def weight_of(self, path: str) -> str:
        """The weight that a tensor is, or is part of where that is packed."""
        return next((weight for prefix, weight in self._packed.items() if path.startswith(prefix)), path)

    @cached_property
    def _sites(self) -> dict[str, list[str]]:
        """The places by the weights that they are, and by the operations."""
        found: dict[str, list[str]] = defaultdict(list)
        for site in self.plan.sites:
            if isinstance(site, Attention) and site.pattern is not None:
                found[f"op {site.pattern.out.name}"].append(site.name)
            elif not isinstance(site, Sublayer | Block):
                for path in site.parameters:
                    found[path].append(site.name)
        return found

    def sites_of(self, nodes: Iterable[fx.Node], weights: Iterable[str], stamped: str) -> tuple[str, ...]:
        """The places that an operation is about: by what it reads, by what it is, by whom it serves."""
        names = [name for path in weights for name in self._sites.get(self.weight_of(path), ())]
        names += [name for node in nodes for name in self._sites.get(f"op {node.name}", ())]
        return tuple(dict.fromkeys((*names, *([stamped] if stamped else ()))))

    def site_of_state(self, path: str) -> tuple[str, ...]:
        """The place at which a method keeps a tensor, or several where they share it."""
        return tuple(dict.fromkeys(b.site.name for b in self.plan.bindings if path in b.tensors))

    def python(self, nodes: Iterable[fx.Node], called: dict[fx.Node, str]) -> tuple[str, ...]:
        """The calls that nodes are, and before each the plumbing that its operands come through."""
        lines: dict[fx.Node, str] = {}

        def write(node: fx.Node) -> None:
            if node in lines or node.op != "call_function":
                return
            for _, source in operands(node):
                if self.skipped(source) and source in called:
                    write(source)
            lines[node] = f"{called[node]} = {_target(node)}({', '.join(_arguments(node, called))})"

        for node in nodes:
            write(node)
        return tuple(lines.values())

    def called(self, block: str | None) -> dict[fx.Node, str]:
        """Short names of all nodes, those of one block first, so that equal blocks have equal ones."""
        count: Counter[str] = Counter()
        names: dict[fx.Node, str] = {}
        own = self.members[block or ""]
        outside = dict.fromkeys(source for node in own for source in node.all_input_nodes)
        for node in (*own, *outside):
            if node in names:
                continue
            if node.op == "get_attr":
                names[node] = str(node.target)
                continue
            stem = _NUMBER.sub("", node.name)
            names[node] = f"{stem}_{count[stem]}" if count[stem] else stem
            count[stem] += 1
        return names


def source_line(node: fx.Node) -> str:
    """The line of the model's own file that asks for `node`: `modeling_llama.py:250: q = self.q_proj(x)`."""
    lines = _LINE.findall(node.meta.get("stack_trace") or "")
    own = [line for line in lines if "torch" not in _FOLDER.split(line[0])[:-1]]  # PyTorch's modules are nobody's
    if not (found := own or lines):
        return ""
    path, number, text = found[-1]
    return plain(f"{_FOLDER.split(path)[-1]}:{number}: {text}")


def _target(node: fx.Node) -> str:
    text = str(node.target)
    return f"torch.ops.{text}" if hasattr(node.target, "_schema") else str(getattr(node.target, "__name__", text))


def _arguments(node: fx.Node, called: dict[fx.Node, str]) -> Iterator[str]:
    for item in node.args:
        yield _written(item, called)
    for name, item in node.kwargs.items():
        yield f"{name}={_written(item, called)}"


def _written(item: Any, called: dict[fx.Node, str]) -> str:
    match item:
        case fx.Node():
            return called.get(item, item.name)
        case list() | tuple():
            return f"[{', '.join(_written(one, called) for one in item)}]"
    return plain(repr(item))
