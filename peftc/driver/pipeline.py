"""The one visible list of stages, from a captured model and a plan to a trainable module.

    capture -> sites -> plan -> [ PASSES ] -> fold -> CompiledModule

Every pass works on the flat graph in place; the verifier runs after each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from peftc.capture.capture import capture
from peftc.capture.inputs import Example
from peftc.diagnostics import debug
from peftc.diagnostics.timings import Timings
from peftc.driver import calibration
from peftc.driver.compiled import CompiledModule
from peftc.driver.verify import Verifier
from peftc.graph.ir import copied
from peftc.graph.normalise import tidy
from peftc.graph.printing import as_text, diff
from peftc.optimise.fold import fold_blocks
from peftc.optimise.fuse import Fired, fuse
from peftc.optimise.regions import Block, mark
from peftc.planning.plan import Binding, Plan
from peftc.planning.planner import make_plan
from peftc.protocol.method import Data, Stage
from peftc.rewrite.attention import attend
from peftc.rewrite.insert import Inserter, materialise
from peftc.rewrite.packed import unpack_in_graph
from peftc.rewrite.penalties import add_penalties
from peftc.rewrite.positions import Rooms, make_room
from peftc.rewrite.prompts import insert_prompts
from peftc.roles.find import find_sites
from peftc.runtime.module import Stages
from peftc.spec.resolve import Intentions


@dataclass
class Work:
    """What the passes share: the module under change, its plan, an artifact's tensors, and who splices."""

    module: fx.GraphModule
    plan: Plan
    state: dict[str, Tensor] | None
    data: Mapping[Binding, Any] | None
    inserter: Inserter
    fuse: bool = True
    rooms: Rooms | None = None
    fired: tuple[Fired, ...] | None = None


Pass = Callable[[Work], bool]  # returns whether it changed the graph


def _materialise(work: Work) -> bool:
    """Tensors first: the rewrites refer to them."""
    materialise(work.module, work.plan, work.state, work.data)
    return False


def _storage(work: Work) -> bool:
    """Who reads a weight that is packed reads what unpacks it."""
    work.inserter.dense = unpack_in_graph(work.module, work.plan, "storage")
    return bool(work.inserter.dense)


def _insert(name: str, stage: Stage) -> Pass:
    def insert(work: Work) -> bool:
        mine = [binding for binding in work.plan.bindings if binding.method.stage is stage]
        for binding in mine:
            work.inserter.insert(binding, name)
        return bool(mine)

    return insert


def _positions(work: Work) -> bool:
    """The text counts its tokens from behind what stands in front of it."""
    before = len(work.module.graph.nodes)
    work.rooms = make_room(work.module.graph, work.plan, "positions")
    return len(work.module.graph.nodes) > before


def _attention(work: Work) -> bool:
    """Learned keys and values."""
    mine = [binding for binding in work.plan.bindings if binding.method.stage is Stage.ATTENTION]
    for binding in mine:
        assert work.rooms is not None
        attend(work.inserter, binding, work.rooms, "attention methods")
    return bool(mine)


def _penalties(work: Work) -> bool:
    """What methods add to the loss in training."""
    return add_penalties(work.module, work.plan, "penalties")


def _prompts(work: Work) -> bool:
    """All at once: each sequence is lengthened by as much as its methods ask for together."""
    mine = [binding for binding in work.plan.bindings if binding.method.stage is Stage.SEQUENCE]
    if mine:
        insert_prompts(work.module, mine, "sequence methods")
    return bool(mine)


def _tidy(work: Work) -> bool:
    """Casts to the dtype a value already has, and what nothing reads any more."""
    return tidy(work.module)


def _fuse(work: Work) -> bool:
    """What belongs together is computed together."""
    if not work.fuse:
        return False
    work.fired = fuse(work.module, work.module.graph, work.plan.sites.blocks)
    debug.tell(1, (f"fusion {fired}" for fired in work.fired))
    return any(fired.count for fired in work.fired)


PASSES: tuple[tuple[str, Pass], ...] = (
    ("materialise", _materialise),
    ("storage", _storage),
    ("weight methods", _insert("weight methods", Stage.WEIGHT)),
    ("output methods", _insert("output methods", Stage.OUTPUT)),
    ("module methods", _insert("module methods", Stage.MODULE)),
    ("positions", _positions),
    ("attention methods", _attention),
    ("sequence methods", _prompts),
    ("penalties", _penalties),
    ("tidy", _tidy),
    ("fusions", _fuse),
)


def plan_model(model: nn.Module, intentions: Intentions, example: Example, timings: Timings) -> Plan:
    """The stages that need shapes only; they run as well on the meta device."""
    captured = capture(model, example, timings)
    with timings.stage("sites"):
        sites = find_sites(captured)
    with timings.stage("plan"):
        return make_plan(captured, sites, intentions)


def calibrate(plan: Plan, batches: list[Any], timings: Timings) -> dict[Binding, Any]:
    """What the plan's methods see of `batches`: the model runs once over them for each kind of question."""
    with timings.stage("calibration"):
        data = calibration.observed(plan, batches)
        if not calibration.wants_state_gradients(plan):
            return data
        captured = plan.captured
        twin = plan_model(captured.model, plan.intentions, captured.example, Timings())
        compiled = build(calibration.probing(twin), Timings())
        wanting = [binding for binding in plan.bindings if binding.method.data is Data.STATE_GRADIENTS]
        return data | dict(zip(wanting, calibration.probed(compiled, batches), strict=True))


def build(
    plan: Plan,
    timings: Timings,
    state: dict[str, Tensor] | None = None,
    data: Mapping[Binding, Any] | None = None,
    fuse: bool = True,
) -> CompiledModule:
    """Runs the passes over the plan's own graph, which it uses up, and emits the module.

    `state` (full name -> tensor) replaces initialisation: an artifact's tensors. `data` is what calibration saw.
    Without `fuse` the graph runs as the passes that insert wrote it: the oracle of what comes behind them.
    """
    work = Work(plan.captured.module, plan, state, data, Inserter(plan.captured.module), fuse)
    verifier = Verifier(work.module, plan)
    with timings.stage("history"):
        stages: Stages = [("capture", copied(work.module.graph)[0])]
    debug.tell(2, (f"{binding.method!r} -> {binding.site.name}  ({binding.span})" for binding in plan.bindings))
    for name, run in PASSES:
        with timings.stage(name):
            changed = run(work)
        with timings.stage("verify"):
            verifier.check(work.module, name)
        with timings.stage("history"):
            stages.append((name, copied(work.module.graph)[0] if changed else stages[-1][1]))
        _tell(name, timings.seconds[name], stages[-2][1], stages[-1][1])
    with timings.stage("fold"):
        outer = fold_blocks(work.module, plan.sites.blocks, Block if fuse else fx.GraphModule)
        if fuse:
            mark(work.module, plan.checkpoints)
    with timings.stage("emit"):
        return CompiledModule(work.module, outer, plan, stages, work.fired)


def _tell(name: str, seconds: float, before: fx.Graph, after: fx.Graph) -> None:
    """What a pass took, what it changed, and the graph as it is then."""
    debug.tell(1, [f"{name}: {seconds:.3f} s, {len(after.nodes) - len(before.nodes):+d} nodes"])
    debug.tell(3, (diff(before, graph) for graph in [after]))
    debug.tell(4, map(as_text, [after]))
