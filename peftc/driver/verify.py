"""What must hold after every pass. A failure is a bug of peftc, and names the pass and the statement."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import fx

from peftc.diagnostics.diagnostic import PeftcError
from peftc.driver.errors import VerifierFailed
from peftc.graph.ir import PROVENANCE, Provenance, asked, computed, get_attribute
from peftc.graph.ir import tensors as tensors_of
from peftc.planning.plan import Plan


class Verifier:
    """Holds what the graph was at first, and compares."""

    def __init__(self, module: fx.GraphModule, plan: Plan) -> None:
        self.plan = plan
        self.original = set(module.graph.nodes)
        self.graph = _graph(module)
        self.tensors = _tensors(module)
        self.checked: set[fx.Node] = set()
        self.known: dict[Any, tuple[list[Any], str]] = {}
        self.frozen = {
            str(node.target): get_attribute(module, str(node.target))
            for node in module.graph.find_nodes(op="get_attr")
            if str(node.target) not in plan.trained and str(node.target) not in plan.packed
        }
        self.replaceable = {
            parameter for binding in plan.bindings if binding.method.prepares for parameter in binding.site.parameters
        }

    def check(
        self, module: fx.GraphModule, pass_name: str, *, graph: bool = True, tensors: bool = True, state: bool = True
    ) -> bool:
        """Looks at the module behind a pass. Returns whether the graph has changed.

        Args:
            module: whose graph the pass worked on.
            pass_name: for the diagnostic.
            graph: whether the pass may change the graph.
            tensors: whether it may change which tensors there are.
            state: whether the plan's tensors are there by now; before, nothing may learn.

        Raises:
            PeftcError: `verifier-failed` unless every invariant holds, with the statement where the node has one.
        """
        before, self.graph = self.graph, _graph(module)
        held, self.tensors = self.tensors, _tensors(module)
        if self.graph != before or self.tensors != held:
            self._lint(module, pass_name)
        if not graph and self.graph != before:
            self._fail(pass_name, "the graph is another, which this pass may not change", None)
        if not tensors and (odd := sorted({name for name, _ in held.items() ^ self.tensors.items()})):
            self._fail(pass_name, f"{odd[0]} is another tensor, which this pass may not change", None)
        self._new_nodes(module, pass_name)
        self._learning(module, pass_name, state)
        return self.graph != before

    def _lint(self, module: fx.GraphModule, pass_name: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lint warns of `training`, an attribute that is no tensor
            try:
                module.graph.lint()
            except (RuntimeError, ValueError) as error:
                self._fail(pass_name, f"the graph is not well formed: {error}", None)

    def _new_nodes(self, module: fx.GraphModule, pass_name: str) -> None:
        """Provenance on each new node, and the shape and dtype it claims."""
        fresh = [n for n in module.graph.nodes if n not in self.original and n not in self.checked]
        for node in fresh:
            self.checked.add(node)
            if node.op != "call_function":
                continue
            stamp = node.meta.get(PROVENANCE)
            if not isinstance(stamp, Provenance):
                self._fail(pass_name, f"{node.name} does not say where it comes from", None)
            self._shapes(node, pass_name, stamp)
            for user in node.users:
                if user in self.original and user.op == "call_function":
                    self._shapes(user, pass_name, stamp)

    def _shapes(self, node: fx.Node, pass_name: str, stamp: Any) -> None:
        """Runs one node on the fake values of its inputs and compares with what the graph says."""
        claimed = node.meta["val"]
        if not isinstance(claimed, torch.Tensor):
            return
        key = asked(node)
        if key not in self.known:  # equal blocks ask the same question
            operands = [given.meta["val"] for given in node.all_input_nodes]
            self.known[key] = operands, _signature(computed(node))
        if (found := self.known[key][1]) != (promised := _signature(claimed)):
            self._fail(pass_name, f"{node.name} is {found} where {promised} was promised", stamp)

    def _learning(self, module: fx.GraphModule, pass_name: str, state: bool) -> None:
        """Frozen tensors are the same objects, so tied ones are still tied; what learns is what was planned."""
        for name, tensor in self.frozen.items():
            if name not in self.replaceable and get_attribute(module, name) is not tensor:
                self._fail(pass_name, f"the frozen {name} was replaced", None)
        planned = {*self.plan.trained, *(name for name, one in self.plan.tensors.items() if one.trainable)}
        learns = {name for name, tensor in module.named_parameters() if tensor.requires_grad}
        if odd := sorted(learns ^ (planned if state else set())):
            self._fail(pass_name, f"{odd[0]} and {len(odd) - 1} more learn unplanned, or do not", None)

    def _fail(self, pass_name: str, reason: str, stamp: Provenance | None) -> None:
        raise PeftcError(VerifierFailed(pass_name=pass_name, reason=reason, span=stamp.span if stamp else None))


def _signature(given: Any) -> str:
    """Shape (symbolically, so that comparing adds no guard) and dtype of a tensor; anything else as it prints."""
    return f"{tuple(given.shape)} {given.dtype}" if isinstance(given, torch.Tensor) else str(given)


def _graph(module: fx.GraphModule) -> list[tuple[Any, ...]]:
    """All that a graph says, to be compared with what it says later."""
    return [(node, node.target, node.args, node.kwargs) for node in module.graph.nodes]


def _tensors(module: fx.GraphModule) -> dict[str, int]:
    """Which tensor has which name."""
    return {name: id(tensor) for name, tensor in tensors_of(module).items()}
