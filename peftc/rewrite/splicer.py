"""What all passes that insert have in common: the graph under change, and each rewrite traced once for all like places.

fakes of the operands -> trace of plain PyTorch -> a template, spliced wherever the same is to be inserted
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import fx

from peftc.graph.ir import PROVENANCE, Provenance, attribute_node, computed, set_tensor, splice, trace, value
from peftc.graph.normalise import training_tensor
from peftc.protocol.method import Method
from peftc.protocol.site import Projection, Site

# Operands that are no state: whether the model is training, and what is known of the place.
TRAINING = "training"
HERE = "here"
TASK_ROWS = "task_rows"  # the number of the task of each row that a caller gave, -1 for none: a buffer


class Templates:
    """Traced functions by what they depend on: equal blocks share one."""

    def __init__(self) -> None:
        self._known: dict[Hashable, fx.Graph] = {}

    def get(self, function: Callable[..., Any], facts: Hashable, fakes: Sequence[torch.Tensor]) -> fx.Graph:
        """The trace of `function` on values like `fakes`.

        Args:
            function: plain PyTorch on as many tensors.
            facts: all that it depends on beside them, such as `of_method`.
            fakes: fake values of the operands: their shapes, precisions and devices are part of the question.
        """
        key = (facts, tuple((str(tuple(fake.shape)), fake.dtype, str(fake.device)) for fake in fakes))
        if key not in self._known:
            self._known[key] = trace(function, *fakes)
        return self._known[key]


def of_method(method: Method, site: Site, names: Iterable[str]) -> Hashable:
    """What the trace of a method's rewrite depends on beside its operands, called `names`: its parameters, the site."""
    layout = (site.rows, site.transposed) if isinstance(site, Projection) else ()
    return type(method), repr(method), site.kind, tuple(site.facts().items()), layout, tuple(names)


class Splicer:
    """Splices bindings into one graph, over all passes.

    Remembers what each original value has become (`current`), which inserted nodes read a site's input beside its own
    (`readers`), which of them reads what enters, and as which of its inputs (`entries`), and what a chain of blocks
    carries on (`carries`, by statement and block).
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.graph = module.graph
        self.templates = Templates()
        self.current: dict[fx.Node, fx.Node] = {}
        self.readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        self.entries: dict[fx.Node, tuple[fx.Node, int]] = {}
        self.carries: dict[tuple[int, str], fx.Node] = {}
        self.dense: dict[str, fx.Node] = {}  # what unpacks each packed weight, by its name

    def operand(self, path: str) -> fx.Node:
        """The node of a tensor of the module; of a packed weight, what unpacks it."""
        return self.dense.get(path) or attribute_node(self.graph, self.module, path)

    def training(self) -> fx.Node:
        """Whether the model is training, as a number in a tensor."""
        return training_tensor(self.graph)

    def which(self, stamp: Provenance) -> fx.Node:
        """The number of the task of each row of the batch: what the model is told of it, for as many as there are."""
        known = self.graph.find_nodes(op="call_function", target=torch.ops.peftc.rows_of_batch.default)
        if known:
            return cast(fx.Node, next(iter(known)))
        first = next(node for node in self.graph.find_nodes(op="placeholder") if value(node).dim())
        if TASK_ROWS not in dict(self.module.named_buffers()):
            set_tensor(self.module, TASK_ROWS, torch.zeros(1, dtype=torch.long, device=value(first).device))
        rows = self.operand(TASK_ROWS)
        last = list(self.graph.find_nodes(op="placeholder"))[-1]
        with self.graph.inserting_after(last):
            batch = self.graph.call_function(torch.ops.aten.sym_size.int, (first, 0))
        with self.graph.inserting_after(batch):
            made = self.graph.call_function(torch.ops.peftc.rows_of_batch.default, (rows, batch))
        batch.meta.update({"val": value(first).shape[0], PROVENANCE: stamp})
        made.meta.update({"val": computed(made), PROVENANCE: stamp})
        return made

    def index(self, path: str, site: Projection) -> fx.Node:
        """A buffer at `path` with the site's rows, for those that are no range."""
        device = value(self.operand(site.weight)).device
        set_tensor(self.module, path, torch.tensor(site.rows, device=device))
        return self.operand(path)

    def splice(
        self, template: fx.Graph, args: Sequence[fx.Node], after: fx.Node, stamp: Provenance,
        inside: fx.Node | None = None,
    ) -> tuple[Any, tuple[fx.Node, ...]]:  # fmt: skip
        """`peftc.graph.ir.splice` into this graph."""
        return splice(self.graph, template, args, after, stamp, inside)
