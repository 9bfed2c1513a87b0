"""An fx graph -> what a person wants to see of it: one block, or the whole model with each block as one node.

Sizes and plumbing (views, casts, slices, arithmetic that changes nothing) become part of the edges, a norm or an
activation that is spelt out in ATen becomes one node again, frozen weights become part of the node that reads them.
What was inserted, and what learns, always stays visible.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import networkx as nx
import torch
from torch import fx

from peftc.capture.convention import Convention
from peftc.diagnostics.source import Span
from peftc.graph.ir import STACK, block_of, call_of, module_path
from peftc.graph.printing import Dims, UniqueSuffixes, dim_names, plain, shape_text, short_name, stamp
from peftc.planning.plan import Plan
from peftc.show.drawing import (
    Cell,
    Drawing,
    DrawnEdge,
    DrawnNode,
    Flow,
    carries_tensor,
    class_name,
    is_plumbing,
    operands,
    origin_of,
    plumbing_text,
    window,
)  # fmt: skip

# Operands whose names say nothing of what they are.
_NAMELESS = frozenset(("", "self", "other", "input", "tensors", "tensor", "tensor1", "tensor2", "mat1", "mat2", "src"))


def draw(graph: fx.Graph, block: str | None, plan: Plan, *, detail: bool = False, trained: bool = True) -> Drawing:
    """`graph` as a drawing of one block, or (None) of the model with a node for each block.

    `detail` keeps plumbing and the operations inside norms and activations. `trained` says that the graph comes from
    behind the pass that makes the existing parameters named by `train` learn.
    """
    return _Artist(graph, block, plan, detail, trained).draw()


class _Artist:
    def __init__(self, graph: fx.Graph, block: str | None, plan: Plan, detail: bool, trained: bool) -> None:
        self.graph, self.block, self.plan, self.detail = graph, block, plan, detail
        self.owner = {node: block_of(node, frozenset(plan.sites.blocks)) for node in graph.nodes}
        self.members: dict[str, list[fx.Node]] = defaultdict(list)
        for node, owner in self.owner.items():
            self.members[owner or ""].append(node)
        self.trained: dict[str, Span] = plan.trained if trained else {}
        self.dims: Dims = dim_names(graph)
        self.state = {
            name: (binding.span, spec.trainable) for binding in plan.bindings for name, spec in binding.tensors.items()
        }
        self.paths = {f"{binding.path}.": binding.span for binding in plan.bindings}
        attributes = [str(node.target) for node in graph.find_nodes(op="get_attr")]
        prefix = f"{block}." if block else ""
        self.names = UniqueSuffixes({path: path.removeprefix(prefix) for path in attributes if path.startswith(prefix)})
        self.cells: dict[fx.Node, Cell] = {}
        self.drawn: dict[str, DrawnNode] = {}
        self.edges: dict[DrawnEdge, None] = {}

    def draw(self) -> Drawing:
        self._arrange()
        for cell in dict.fromkeys(self.cells.values()):
            self._cell(cell)
        self._outputs()
        order = {node.name: index for index, node in enumerate(self.graph.nodes)}
        nodes = sorted(self.drawn.values(), key=lambda node: order.get(node.id.partition(":")[2], len(order)))
        return Drawing(self.block or self.plan.sites.model, tuple(nodes), tuple(self.edges))

    # Following tensors

    def _skipped(self, node: fx.Node) -> bool:
        return not self.detail and is_plumbing(node)

    def _flows(self, node: fx.Node) -> Iterator[Flow]:
        """The tensors `node` reads, each followed to the node that is drawn for it."""
        for argument, source in operands(node):
            through: list[str] = []
            while self._skipped(source):
                through.insert(0, plumbing_text(source))
                source = next(iter(operands(source)))[1]
            yield Flow(source, argument, tuple(text for text in through if text))

    # Which nodes are one

    def _arrange(self) -> None:
        shown = [n for n in self.graph.nodes if carries_tensor(n) and n.op != "get_attr" and not self._skipped(n)]
        self.cells = {node: Cell(f"op:{node.name}", [node]) for node in shown if self.owner[node] == self.block}
        if self.block is None:
            known = set(shown)
            for path in self.plan.sites.blocks:
                calls: dict[str | None, list[fx.Node]] = defaultdict(list)
                for node in self.members[path]:
                    if node in known:
                        calls[call_of(node, path)].append(node)
                for nodes in calls.values():
                    self._merge(Cell(f"op:{nodes[0].name}", nodes, path))
        if not self.detail:
            for nodes in self._spelt_out().values():
                self._merge_open(nodes, class_name(nodes[0]))
        if not self.detail and self.block is None:
            for nodes in self._integers().values():
                self._merge_open(nodes, "index arithmetic")

    def _spelt_out(self) -> dict[str, list[fx.Node]]:
        """The original nodes of each module that has no module inside: a norm, an activation, a rotary embedding."""
        groups: dict[str, list[fx.Node]] = defaultdict(list)
        inner: set[str] = set()
        for node, cell in self.cells.items():
            if cell.block is None and (stack := node.meta.get(STACK)):
                *outer, last = (path for path, _ in stack.values())
                inner.update(outer)
                if stamp(node) is None and node.op == "call_function":
                    groups[last].append(node)
        return {path: nodes for path, nodes in groups.items() if path not in inner and path not in (self.block, "")}

    def _integers(self) -> dict[str, list[fx.Node]]:
        """Positions and masks by the module that makes them."""
        groups: dict[str, list[fx.Node]] = defaultdict(list)
        for node, cell in self.cells.items():
            fake = node.meta.get("val")
            whole = isinstance(fake, torch.Tensor) and not fake.is_floating_point()
            if (
                cell.block is None
                and len(cell.nodes) == 1
                and whole
                and node.op == "call_function"
                and stamp(node) is None
            ):
                groups[module_path(node)].append(node)
        return groups

    def _merge(self, cell: Cell) -> None:
        self.cells.update(dict.fromkeys(cell.nodes, cell))

    def _merge_open(self, nodes: list[fx.Node], name: str) -> None:
        """Makes several nodes one, unless that would close a circle."""
        if len(nodes) > 1 and not self._closes(set(nodes)):
            self._merge(Cell(f"op:{nodes[0].name}", nodes, module=name))

    def _closes(self, group: set[fx.Node]) -> bool:
        """Whether a path leaves the group and comes back."""
        inside = {id(self.cells[node]) for node in group}
        flow: nx.DiGraph[int] = nx.DiGraph()
        flow.add_node(0)
        for node, cell in self.cells.items():
            for step in self._flows(node):
                source = self.cells.get(step.source)
                ends = [0 if id(end) in inside else id(end) for end in (source, cell) if end is not None]
                if len(ends) == 2 and ends[0] != ends[1]:
                    flow.add_edge(*ends)
        return not nx.is_directed_acyclic_graph(flow)

    # Drawing

    def _cell(self, cell: Cell) -> None:
        """The node of a cell, and the edges and parameters that enter it."""
        frozen: dict[str, Any] = {}
        beside: list[fx.Node] = []
        for node in cell.nodes:
            for step in self._flows(node):
                path = str(step.source.target)
                if step.source.op != "get_attr":
                    self._enter(cell, step)
                elif path in self.trained or self._added(path):
                    beside.append(step.source)
                else:
                    frozen[path] = step.source.meta.get("val")
        if cell.block is not None:
            self.drawn[cell.id] = self._block_node(cell, beside)
            return
        self.drawn[cell.id] = self._operation(cell, frozen, beside)
        for source in dict.fromkeys(beside):
            self._parameter(source)
            self._connect(f"parameter:{source.name}", cell.id)

    def _enter(self, cell: Cell, step: Flow) -> None:
        origin = self.cells.get(step.source)
        if origin is cell:
            return
        if origin is None:
            self._input(step.source, step.argument)
        merged = len(cell.nodes) > 1 or cell.block is not None
        through = () if merged else step.through
        argument = "" if merged else step.argument
        self._connect(f"input:{step.source.name}" if origin is None else origin.id, cell.id, argument, through)

    def _connect(self, source: str, target: str, argument: str = "", through: tuple[str, ...] = ()) -> None:
        self.edges.setdefault(DrawnEdge(source, target, argument, through))

    def _operation(self, cell: Cell, frozen: dict[str, Any], beside: list[fx.Node]) -> DrawnNode:
        first, last = cell.nodes[0], cell.nodes[-1]
        if first.op == "placeholder":
            return DrawnNode(cell.id, "input", plain(str(first.target)), shape=self._shape(first))
        found = stamp(first)
        widest = max(frozen, key=lambda path: getattr(frozen[path], "ndim", 0), default=None)
        owners = [] if found else [self.names.short(str(node.target)).rpartition(".")[0] for node in beside]
        name = self.names.short(widest) if widest else owners[0] if owners else ""
        notes = [f"reads {path} {shape_text(fake, self.dims)}" for path, fake in frozen.items()]
        if len(cell.nodes) > 1:
            notes.append(f"{len(cell.nodes)} operations: {', '.join(map(short_name, cell.nodes))}"[:160])
        if found is not None:
            notes.append(f"inserted by {found.pass_name} at {found.site}")
        elif path := module_path(last):
            notes.append(f"in {path}")
        return DrawnNode(
            cell.id, "operation", cell.module or short_name(first) + window(first), plain(name), self._shape(last),
            inserted=found is not None,
            origins=(origin_of(found.span),) if found is not None and found.span else (),
            notes=tuple(map(plain, notes)),
        )  # fmt: skip

    def _block_node(self, cell: Cell, beside: list[fx.Node]) -> DrawnNode:
        every = self.members[cell.block or ""]
        stamps = [found for node in every if (found := stamp(node))]
        learning = [str(node.target) for node in dict.fromkeys(beside)]
        spans = [found.span for found in stamps if found.span]
        spans += [self.trained[path] for path in learning if path in self.trained]
        origins = sorted({origin_of(span) for span in spans}, key=lambda origin: (origin.file, origin.line))
        notes = [f"{len(every)} operations, {len(stamps)} of them inserted"]
        if learning:
            notes.append(f"{len(learning)} tensors of the methods, or trained")
        return DrawnNode(
            cell.id, "operation", plain(cell.block or ""), "", self._shape(cell.nodes[-1]),
            inserted=bool(stamps), origins=tuple(origins), notes=tuple(notes),
        )  # fmt: skip

    def _parameter(self, node: fx.Node) -> None:
        path = str(node.target)
        added = self._added(path)
        span = added[0] if added else self.trained[path]
        self.drawn[f"parameter:{node.name}"] = DrawnNode(
            f"parameter:{node.name}", "parameter", plain(self.names.short(path, 3 if added else 2)),
            shape=self._shape(node), inserted=added is not None, trainable=added is None or added[1],
            origins=(origin_of(span),), notes=(plain(path),),
        )  # fmt: skip

    def _added(self, path: str) -> tuple[Span, bool] | None:
        """The statement behind a tensor the base model does not have, and whether it learns."""
        if path in self.state:
            return self.state[path]
        return next(((span, False) for prefix, span in self.paths.items() if path.startswith(prefix)), None)

    def _input(self, node: fx.Node, argument: str) -> None:
        """What enters a block, called after what it is there, else after who made it."""
        owner = self.owner[node]
        named = argument not in _NAMELESS
        maker = owner or (str(node.target) if node.op == "placeholder" else argument if named else short_name(node))
        where = "" if owner or node.op == "placeholder" or named else module_path(node).rpartition(".")[2]
        self.drawn[f"input:{node.name}"] = DrawnNode(
            f"input:{node.name}", "input", plain(maker), plain(where), self._shape(node)
        )

    def _outputs(self) -> None:
        """Results: of the graph, or of the block and who reads them."""
        readers: dict[fx.Node, list[tuple[str, Flow]]] = defaultdict(list)
        for node in self.graph.nodes:
            if node in self.cells or self._skipped(node) or not (carries_tensor(node) or node.op == "output"):
                continue
            names = self._result_names(node)
            for step in self._flows(node):
                if step.source in self.cells:
                    name = names.pop(0) if names else self.owner[node] or _reader_name(node)
                    readers[step.source].append((name, step))
        for source, found in readers.items():
            names = list(dict.fromkeys(name for name, _ in found))
            key = f"output:{source.name}"
            label = ", ".join(names) if len(names) <= 2 else "output"
            self.drawn[key] = DrawnNode(key, "output", plain(label), shape=self._shape(source))
            self._connect(self.cells[source].id, key, "", found[0][1].through)

    def _result_names(self, node: fx.Node) -> list[str]:
        """The fields of the model's result, such as loss and logits, where they are known."""
        if node.op != "output":
            return []
        keys = Convention(self.plan.captured.inputs, self.plan.captured.result).keys
        count = sum(1 for _ in operands(node))
        return keys if len(keys) == count else ["output"] * count

    def _shape(self, node: fx.Node) -> str:
        return shape_text(node.meta.get("val"), self.dims)


def _reader_name(node: fx.Node) -> str:
    """Who reads a block's result: the module, else the operation."""
    return module_path(node).rpartition(".")[2] or short_name(node)
