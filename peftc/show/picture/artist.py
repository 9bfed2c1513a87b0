"""An fx graph -> what a person wants to see of it: one block, or the whole model with each block as one node.

Sizes and plumbing (views, casts, slices, arithmetic that changes nothing) become part of the edges, a norm or an
activation that is spelt out in ATen becomes one node again, so does the arithmetic of positions; frozen weights become
part of the node that reads them. What was inserted, and what learns, always stays visible.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import fx

from peftc.capture.convention import Convention
from peftc.graph.ir import call_of, module_path
from peftc.graph.printing import UniqueSuffixes, plain, shape_text, short_name, stamp
from peftc.planning.plan import Plan
from peftc.show.picture.drawing import (
    Cell,
    Drawing,
    DrawnEdge,
    DrawnNode,
    Flow,
    carries_tensor,
    class_name,
    joined,
    operands,
    origin_of,
    window,
)  # fmt: skip
from peftc.show.picture.folds import POSITIONS, ROTARY, integers, position_arithmetic, rotary, spelt_out
from peftc.show.picture.scene import Scene, source_line

# Operands whose names say nothing of what they are.
_NAMELESS = frozenset(("", "self", "other", "input", "tensors", "tensor", "tensor1", "tensor2", "mat1", "mat2", "src"))
_LINES = 24  # of Python that one node shows


def draw(graph: fx.Graph, block: str | None, plan: Plan, *, detail: bool = False, trained: bool = True) -> Drawing:
    """`graph` as a drawing of one block, or (None) of the model with a node for each block.

    `detail` keeps plumbing and the operations inside norms and activations. `trained` says that the graph comes from
    behind the pass that makes the existing parameters named by `train` learn.
    """
    return draw_on(Scene(graph, plan, detail=detail, trained=trained), block)


def draw_on(scene: Scene, block: str | None) -> Drawing:
    """The same of a graph that has been read."""
    return _Artist(scene, block).draw()


class _Artist:
    def __init__(self, scene: Scene, block: str | None) -> None:
        self.scene, self.block, self.plan, self.detail = scene, block, scene.plan, scene.detail
        self.dims = scene.dims
        prefix = f"{block}." if block else ""
        own = {path: path.removeprefix(prefix) for path in scene.attributes if path.startswith(prefix)}
        packed = {weight: weight.removeprefix(prefix) for weight in self.plan.packed if weight.startswith(prefix)}
        self.names = UniqueSuffixes(packed | own)
        self.called = scene.called(block)
        self.cells: dict[fx.Node, Cell] = {}
        self.drawn: dict[str, DrawnNode] = {}
        self.edges: dict[DrawnEdge, None] = {}

    def draw(self) -> Drawing:
        self._arrange()
        for cell in dict.fromkeys(self.cells.values()):
            self._cell(cell)
        self._outputs()
        order = {node.name: index for node, index in self.scene.order.items()}
        nodes = sorted(self.drawn.values(), key=lambda node: order.get(node.id.partition(":")[2], len(order)))
        return Drawing(self.block or self.plan.sites.model, tuple(nodes), tuple(self.edges))

    # Which nodes are one

    def _arrange(self) -> None:
        scene = self.scene
        mine = scene.graph.nodes if self.block is None else scene.members[self.block]
        shown = [n for n in mine if carries_tensor(n) and n.op != "get_attr" and not scene.skipped(n)]
        self.cells = {node: Cell(f"op:{node.name}", [node]) for node in shown if scene.owner[node] == self.block}
        if self.block is None:
            known = set(shown)
            for path in self.plan.sites.blocks:
                calls: dict[str | None, list[fx.Node]] = defaultdict(list)
                for node in scene.members[path]:
                    if node in known:
                        calls[call_of(node, path)].append(node)
                for nodes in calls.values():
                    self._merge(Cell(f"op:{nodes[0].name}", nodes, path))
        if self.detail:
            return
        for nodes in spelt_out(self._alone(), self.block):
            self._merge_open(nodes, class_name(nodes[0]))
        for nodes in rotary(scene, self._alone()):
            self._merge_open(nodes, ROTARY)
        if self.block is None:
            for nodes in integers(self._alone()):
                self._merge_open(nodes, POSITIONS)
        for nodes in position_arithmetic(scene, self._alone()):
            self._merge_open(nodes, POSITIONS)

    def _alone(self) -> list[fx.Node]:
        """The nodes that are not yet one with others."""
        return [node for node, cell in self.cells.items() if cell.block is None and len(cell.nodes) == 1]

    def _merge(self, cell: Cell) -> None:
        self.cells.update(dict.fromkeys(cell.nodes, cell))

    def _merge_open(self, nodes: list[fx.Node], name: str) -> None:
        """Makes several nodes one, unless that would close a circle."""
        if len(nodes) > 1 and not self._closes(set(nodes)):
            self._merge(Cell(f"op:{nodes[0].name}", nodes, module=name))

    def _closes(self, group: set[fx.Node]) -> bool:
        """Whether a path leaves the group and comes back."""
        waiting, seen = list(group), set(group)
        while waiting:
            node = waiting.pop()
            for step in self.scene.flows(node):
                if (cell := self.cells.get(step.source)) is None or step.source in seen:
                    if node not in group and step.source in group:
                        return True
                    continue
                seen.update(cell.nodes)
                waiting.extend(cell.nodes)
        return False

    # Drawing

    def _cell(self, cell: Cell) -> None:
        """The node of a cell, and the edges and parameters that enter it."""
        frozen: dict[str, Any] = {}
        beside: list[fx.Node] = []
        for node in cell.nodes:
            for step in self.scene.flows(node):
                path = str(step.source.target)
                if step.source.op != "get_attr":
                    self._enter(cell, step)
                elif self.scene.is_beside(path):
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
        notes = []
        if len(cell.nodes) > 1:
            notes.append(f"{len(cell.nodes)} operations: {', '.join(map(short_name, cell.nodes))}"[:160])
        if found is not None:
            notes.append(f"inserted by {found.pass_name} at {found.site}")
        elif path := module_path(last):
            notes.append(f"in {path}")
        return DrawnNode(
            cell.id, "operation", cell.module or short_name(first) + window(first),
            plain(self._named_after(frozen) or ("" if found else self._owner_of(beside))), self._shape(last),
            inserted=found is not None,
            origins=(origin_of(found.span),) if found is not None and found.span else (),
            notes=tuple(map(plain, notes)),
            reads=tuple(plain(f"{path} {shape_text(fake, self.dims)}") for path, fake in frozen.items()),
            made=found.pass_name if found else "",
            sites=self.scene.sites_of(
                cell.nodes, (*frozen, *(str(node.target) for node in beside)), found.site if found else ""
            ),
            python=self.scene.python(cell.nodes[:_LINES], self.called),
            source=source_line(last),
            folded=len(cell.nodes) > 1,
        )  # fmt: skip

    def _named_after(self, frozen: dict[str, Any]) -> str:
        """The matrices that an operation reads, all of a fused one; else its first vector, and those called so."""
        own = {path: fake for path, fake in frozen.items() if path not in self.scene.buffers} or frozen
        sizes = {path: getattr(fake, "ndim", 0) for path, fake in own.items()}
        widest = max(sizes.values(), default=0)
        weights = [self.scene.weight_of(path) for path, size in sizes.items() if size == widest]
        names = [self.names.short(path) for path in dict.fromkeys(weights)]
        return joined(names if widest > 1 else [name for name in names if _leaf(name) == _leaf(names[0])])

    def _owner_of(self, beside: list[fx.Node]) -> str:
        return next((self.names.short(str(node.target)).rpartition(".")[0] for node in beside), "")

    def _block_node(self, cell: Cell, beside: list[fx.Node]) -> DrawnNode:
        every = self.scene.members[cell.block or ""]
        stamps = [found for node in every if (found := stamp(node))]
        learning = [str(node.target) for node in dict.fromkeys(beside)]
        spans = [found.span for found in stamps if found.span]
        spans += [self.scene.trained[path] for path in learning if path in self.scene.trained]
        origins = sorted({origin_of(span) for span in spans}, key=lambda origin: (origin.file, origin.line))
        notes = [f"{len(every)} operations, {len(stamps)} of them inserted"]
        if learning:
            notes.append(f"{len(learning)} tensors of the methods, or trained")
        return DrawnNode(
            cell.id, "operation", plain(cell.block or ""), "", self._shape(cell.nodes[-1]),
            inserted=bool(stamps), origins=tuple(origins), notes=tuple(notes),
            sites=(cell.block or "",), opens=cell.block or "",
        )  # fmt: skip

    def _parameter(self, node: fx.Node) -> None:
        path = str(node.target)
        added = self.scene.added(path)
        span = added[0] if added else self.scene.trained[path]
        self.drawn[f"parameter:{node.name}"] = DrawnNode(
            f"parameter:{node.name}", "parameter", plain(self.names.short(path, 3 if added else 2)),
            shape=self._shape(node), inserted=added is not None, trainable=added is None or added[1],
            origins=(origin_of(span),), notes=(plain(path),), made="materialise" if added else "",
            sites=self.scene.sites_of((), (path,), "") if added is None else self.scene.site_of_state(path),
        )  # fmt: skip

    def _input(self, node: fx.Node, argument: str) -> None:
        """What enters a block, called after what it is there, else after who made it."""
        owner = self.scene.owner[node]
        named = argument not in _NAMELESS
        maker = owner or (str(node.target) if node.op == "placeholder" else argument if named else short_name(node))
        where = "" if owner or node.op == "placeholder" or named else module_path(node).rpartition(".")[2]
        self.drawn[f"input:{node.name}"] = DrawnNode(
            f"input:{node.name}", "input", plain(maker), plain(where), self._shape(node), opens=owner or ""
        )

    def _outputs(self) -> None:
        """Results: of the graph, or of the block and who reads them."""
        readers: dict[fx.Node, list[tuple[str, Flow]]] = defaultdict(list)
        for node in self.scene.readers(self.cells):
            if node in self.cells or self.scene.skipped(node) or not (carries_tensor(node) or node.op == "output"):
                continue
            names = self._result_names(node)
            for step in self.scene.flows(node):
                if step.source in self.cells:
                    name = names.pop(0) if names else self.scene.owner[node] or _reader_name(node)
                    readers[step.source].append((name, step))
        for source, found in readers.items():
            names = list(dict.fromkeys(name for name, _ in found))
            key = f"output:{source.name}"
            label = ", ".join(names) if len(names) <= 2 else "output"
            opens = next((name for name in names if name in self.plan.sites.blocks), "")
            self.drawn[key] = DrawnNode(key, "output", plain(label), shape=self._shape(source), opens=opens)
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


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _reader_name(node: fx.Node) -> str:
    """Who reads a block's result: the module, else the operation."""
    return module_path(node).rpartition(".")[2] or short_name(node)
