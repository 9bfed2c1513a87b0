"""The passes: from a captured graph to one with everything in it that a plan asks for, in the order in which they run.

    materialise -> storage -> weight, output, module methods -> positions -> attention, sequence methods
        -> penalties -> tidy -> fusions

Each works on the flat graph in place, and says what it needs of those before it, what it gives to those behind it, and
what it may change. `run` holds it to that, and lets the verifier look at the graph before and behind each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, fx

from peftc.diagnostics import debug
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.timings import Timings
from peftc.driver.errors import UsedPlan
from peftc.driver.verify import Verifier
from peftc.graph.ir import copied
from peftc.graph.normalise import tidy
from peftc.graph.printing import as_text, diff
from peftc.graph.surroundings import uncollected
from peftc.optimise.fuse import Fired, fuse
from peftc.planning.plan import Binding, Plan
from peftc.protocol.method import Stage
from peftc.rewrite.attention import attend
from peftc.rewrite.insert import insert
from peftc.rewrite.packed import unpack_in_graph
from peftc.rewrite.penalties import add_penalties
from peftc.rewrite.positions import Positions, make_room
from peftc.rewrite.prompts import insert_prompts
from peftc.rewrite.splicer import Splicer
from peftc.rewrite.state import materialise
from peftc.show.errors import UnknownPass

CAPTURE = "capture"  # what the graph is called that the first pass is given
USED = "peftc used"  # on a module whose graph passes have changed


@dataclass
class Work:
    """What the passes work on, and what they hand on to each other.

    `state` (full name -> tensor) replaces initialisation: an artifact's tensors. `data` is what calibration saw.
    `unread`: the frozen weights are left in their checkpoint.
    `given`: what the passes so far have given, by name.
    """

    plan: Plan
    splicer: Splicer
    state: Mapping[str, Tensor] | None = None
    data: Mapping[Binding, Any] | None = None
    unread: bool = False
    given: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def on(cls, plan: Plan, **known: Any) -> Work:
        """The work on a plan, whose own graph it changes.

        Raises:
            PeftcError: `used-plan` where passes have changed it already.
        """
        module = plan.captured.module
        if module.meta.get(USED):
            raise PeftcError(UsedPlan(model=plan.sites.model))
        module.meta[USED] = True
        return cls(plan, Splicer(module), **known)

    @property
    def module(self) -> fx.GraphModule:
        """The graph and its tensors."""
        return self.splicer.module

    def bindings(self, stage: Stage) -> list[Binding]:
        """Those of one stage, in the order of the file."""
        return [binding for binding in self.plan.bindings if binding.method.stage is stage]


@dataclass(frozen=True)
class Pass:
    """One step. `run` does it, and returns what it gives, where it gives something.

    needs   what passes before it have given
    gives   what it gives to those behind it
    graph, tensors   whether it may change them
    """

    name: str
    run: Callable[[Work], Any]
    needs: tuple[str, ...] = ()
    gives: str = ""
    graph: bool = True
    tensors: bool = False


def _materialise(work: Work) -> bool:
    """Tensors first: the rewrites refer to them."""
    materialise(work.module, work.plan, work.state, work.data, unread=work.unread)
    return True


def _storage(work: Work) -> bool:
    """Who reads a weight that is packed reads what unpacks it."""
    work.splicer.dense = unpack_in_graph(work.splicer, work.plan, "storage")
    return True


def _insert(stage: Stage, name: str, work: Work) -> None:
    """Methods at linear layers, experts, sublayers and blocks."""
    for binding in work.bindings(stage):
        insert(work.splicer, binding, name)


def _positions(work: Work) -> Positions:
    """The text counts its tokens from behind what stands in front of it."""
    return make_room(work.module.graph, work.plan, "positions")


def _attention(work: Work) -> None:
    """Learned keys and values: first those in front, then those whose effect is gated, then those attended apart."""
    ordered = sorted(work.bindings(Stage.ATTENTION), key=lambda b: (b.method.attends_apart, b.method.has_gate))
    for binding in ordered:
        attend(work.splicer, binding, work.given["positions"], "attention methods")


def _prompts(work: Work) -> None:
    """All at once: each sequence is lengthened by as much as its methods ask for together."""
    if mine := work.bindings(Stage.SEQUENCE):
        insert_prompts(work.module, mine, "sequence methods")


def _penalties(work: Work) -> None:
    """What methods add to the loss in training."""
    add_penalties(work.splicer, work.plan, "penalties")


def _tidy(work: Work) -> None:
    """Casts to the dtype a value already has, and what nothing reads any more."""
    tidy(work.module)


def _fusions(work: Work) -> tuple[Fired, ...]:
    """What belongs together is computed together."""
    fired = fuse(work.module, work.module.graph, work.plan.sites.blocks)
    debug.tell(1, (f"fusion {one}" for one in fired))
    return fired


def _methods(stage: Stage) -> Pass:
    name = f"{stage.name.lower()} methods"
    return Pass(name, partial(_insert, stage, name), needs=("state", "weights"), tensors=True)


PASSES: tuple[Pass, ...] = (
    Pass("materialise", _materialise, gives="state", graph=False, tensors=True),
    Pass("storage", _storage, needs=("state",), gives="weights", tensors=True),
    _methods(Stage.WEIGHT),
    _methods(Stage.OUTPUT),
    _methods(Stage.MODULE),
    Pass("positions", _positions, gives="positions"),
    Pass("attention methods", _attention, needs=("state", "weights", "positions"), tensors=True),
    Pass("sequence methods", _prompts, needs=("state",)),
    Pass("penalties", _penalties, needs=("state",)),
    Pass("tidy", _tidy),
    Pass("fusions", _fusions, gives="fired"),
)

# Where nothing is to be fused the last pass leaves everything as it is.
UNFUSED = (*PASSES[:-1], replace(PASSES[-1], run=lambda _work: ()))


def run(work: Work, passes: Sequence[Pass], timings: Timings) -> Iterator[tuple[str, fx.Graph]]:
    """Runs `passes` one after the other; after each, its name and the graph as it is then (a copy, where it changed).

    Raises:
        ValueError: where a pass needs what none before it gives: the list is wrong.
        PeftcError: `verifier-failed` where a pass broke the graph, or changed what it may not change.
    """
    verifier = Verifier(work.module, work.plan)
    before = copied(work.module.graph)[0]
    yield CAPTURE, before
    for step in passes:
        if missing := [name for name in step.needs if name not in work.given]:
            raise ValueError(f"pass {step.name!r} needs {', '.join(missing)}, which no pass before it gives")
        with uncollected() if step.graph else nullcontext():
            with timings.stage(step.name):
                given = step.run(work)
            if step.gives:
                work.given[step.gives] = given
            with timings.stage("verify"):
                allowed = {"graph": step.graph, "tensors": step.tensors, "state": "state" in work.given}
                changed = verifier.check(work.module, step.name, **allowed)
            with timings.stage("history"):
                after = copied(work.module.graph)[0] if changed else before
        _tell(step.name, timings.seconds[step.name], before, after)
        yield step.name, after
        before = after


def up_to(name: str | None, passes: Sequence[Pass] = PASSES) -> tuple[Pass, ...]:
    """The passes as far as the one called `name`: none for the capture, all for None.

    Raises:
        PeftcError: `unknown-pass` where there is none of that name.
    """
    known = (CAPTURE, *(step.name for step in passes))
    if name is not None and name not in known:
        raise PeftcError(UnknownPass(name=name, known=known))
    return tuple(passes if name is None else passes[: known.index(name)])


def alone(name: str, passes: Sequence[Pass] = PASSES) -> tuple[Pass, ...]:
    """One pass, behind those alone that give what it needs."""
    *before, last = up_to(name, passes)
    needed, chosen = {*last.needs}, [last]
    for step in reversed(before):
        if step.gives in needed:
            needed |= {*step.needs}
            chosen.insert(0, step)
    return tuple(chosen)


def _tell(name: str, seconds: float, before: fx.Graph, after: fx.Graph) -> None:
    """What a pass took, what it changed, and the graph as it is then."""
    debug.tell(1, [f"{name}: {seconds:.3f} s, {len(after.nodes) - len(before.nodes):+d} nodes"])
    debug.tell(3, (diff(before, graph) for graph in [after]))
    debug.tell(4, map(as_text, [after]))
