"""Each pass alone, text in and text out, on a model of about ten operations; and what the list of passes holds them to.

A golden file says what the pass was given, what it left, and what it changed, of the graph and of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import peftc
from golden import check
from paths import GOLDEN
from peftc.capture.inputs import example_inputs
from peftc.diagnostics.timings import Timings
from peftc.driver.passes import PASSES, Pass, Work, alone, run, up_to
from peftc.driver.pipeline import build
from peftc.driver.planned import plan_model
from peftc.graph.ir import set_tensor, tensors
from peftc.graph.printing import as_text, diff, shape_text
from peftc.planning.plan import Plan
from peftc.spec.check import intend
from tiny import Attending, Classifier, Gated, Layer, Stack, Tagger, example

TEXTS = GOLDEN / "passes"
LORA = "apply lora(r=2) to linear\n"


@dataclass(frozen=True)
class Case:
    """A model and a spec that give a pass something to do; `behind` a pass that leaves it something."""

    model: type[nn.Module]
    spec: str
    behind: str | None = None


CASES = {
    "materialise": Case(Layer, "apply lora(r=2) to linear\ntrain bias\n"),
    "storage": Case(Layer, "quantize linear with nf4\ntrain bias\n"),
    "weight methods": Case(Layer, LORA),
    "output methods": Case(Layer, "apply ia3 to linear\n"),
    "module methods": Case(Stack, "apply adapter(size=2) to mlp\n"),
    "positions": Case(Attending, "apply prefix(length=3) to attn\n"),
    "attention methods": Case(Attending, "apply prefix(length=3) to attn\n"),
    "sequence methods": Case(Tagger, "apply prompt(length=3)\n"),
    "penalties": Case(Classifier, "apply adalora(r=2, target=1) to linear\n"),
    "tidy": Case(Layer, LORA, behind="weight methods"),
    "fusions": Case(Gated, "train bias\n"),
}
STATE, WEIGHTS = "materialise", "storage"
NEEDED = {
    "materialise": (),
    "storage": (STATE,),
    "weight methods": (STATE, WEIGHTS),
    "output methods": (STATE, WEIGHTS),
    "module methods": (STATE, WEIGHTS),
    "positions": (),
    "attention methods": (STATE, WEIGHTS, "positions"),
    "sequence methods": (STATE,),
    "penalties": (STATE,),
    "tidy": (),
    "fusions": (),
}


def plan_of(model: type[nn.Module], spec: str) -> Plan:
    built = model()
    return plan_model(built, intend(spec), example_inputs(built, example(built)), Timings())


def tensor_lines(module: nn.Module) -> dict[str, str]:
    return {
        name: f"{name}: {shape_text(tensor.data, {})}{', learns' * tensor.requires_grad}"
        for name, tensor in tensors(module).items()
    }


def changed_tensors(before: dict[str, str], after: dict[str, str]) -> str:
    gone = [f"- {line}\n" for name, line in before.items() if after.get(name) != line]
    return "".join([*gone, *(f"+ {line}\n" for name, line in after.items() if before.get(name) != line)])


@pytest.mark.parametrize("name", CASES)
def test_a_pass_alone(name: str, pytestconfig: pytest.Config) -> None:
    case = CASES[name]
    chosen = (*(alone(case.behind) if case.behind else ()), *alone(name))
    work = Work.on(plan_of(case.model, case.spec))
    history = [(graph, tensor_lines(work.module)) for _, graph in run(work, chosen, Timings())]
    (before, had), (after, has) = history[-2:]
    sections = {
        f"spec for {case.model.__name__}": case.spec,
        "passes": "".join(f"{step.name}\n" for step in chosen),
        "before": as_text(before),
        "after": as_text(after),
        "graph": diff(before, after),
        "tensors": changed_tensors(had, has) or "no change\n",
    }
    text = "\n".join(f"== {title}\n{section}" for title, section in sections.items())
    check(TEXTS / f"{name.replace(' ', '-')}.txt", text, pytestconfig)
    assert (as_text(before), had) != (as_text(after), has)


def test_every_pass_has_a_text() -> None:
    names = [step.name for step in PASSES]
    assert [*CASES] == [*NEEDED] == names
    assert {path.stem for path in TEXTS.glob("*.txt")} == {name.replace(" ", "-") for name in names}


# ---- The list ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEEDED)
def test_alone_is_behind_what_it_needs_and_nothing_else(name: str) -> None:
    assert [step.name for step in alone(name)] == [*NEEDED[name], name]


def test_up_to_is_all_as_far_as_a_pass() -> None:
    assert up_to("materialise") == PASSES[:1]
    assert up_to("output methods") == PASSES[:4]
    assert up_to("fusions") == PASSES


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["storage", "materialise"], "pass 'storage' needs state, which no pass before it gives"),
        (["weight methods"], "pass 'weight methods' needs state, weights, which no pass before it gives"),
        (["materialise", "storage", "attention methods", "positions"],
         "pass 'attention methods' needs positions, which no pass before it gives"),
    ],
)  # fmt: skip
def test_a_wrong_order_is_refused_in_words(names: list[str], message: str) -> None:
    known = {step.name: step for step in PASSES}
    work = Work.on(plan_of(Layer, LORA))
    with pytest.raises(ValueError, match=f"^{message}$"):
        list(run(work, [known[name] for name in names], Timings()))


def test_a_plan_is_built_once(pytestconfig: pytest.Config) -> None:
    plan = plan_of(Layer, LORA)
    build(plan, Timings())
    with pytest.raises(peftc.PeftcError) as caught:
        build(plan, Timings())
    assert [one.code for one in caught.value.diagnostics] == ["used-plan"]
    check(TEXTS / "used-plan.err", f"{caught.value}\n", pytestconfig)


def test_without_fusions_the_last_pass_leaves_everything() -> None:
    plain = peftc.compile(Gated(), LORA, example=example(Gated()), fuse=False).history
    fused = peftc.compile(Gated(), LORA, example=example(Gated())).history
    assert [*plain] == [*fused] == ["capture", *(step.name for step in PASSES)]
    assert as_text(plain["fusions"]) == as_text(plain["tidy"]) == as_text(fused["tidy"])
    assert as_text(fused["fusions"]) != as_text(fused["tidy"])


# ---- The verifier --------------------------------------------------------------------------------------------------


def inserts(work: Work) -> None:
    work.splicer.operand("proj.lora.A")


def adds_a_tensor(work: Work) -> None:
    set_tensor(work.module, "proj.more", torch.ones(2))


def replaces_a_tensor(work: Work) -> None:
    set_tensor(work.module, "proj.lora.A", nn.Parameter(torch.ones(2, 6)))


def thaws(work: Work) -> None:
    work.module.get_parameter("proj.bias").requires_grad_(True)


def reads_ahead(work: Work) -> None:
    first, *_, last = (node for node in work.module.graph.nodes if node.op == "call_function")
    with work.module.graph.inserting_before(first):
        work.module.graph.call_function(torch.ops.aten.neg.default, (last,))


def test_a_pass_that_leaves_no_graph_is_named() -> None:
    work = Work.on(plan_of(Layer, LORA))
    with pytest.raises(peftc.PeftcError, match=r"in pass 'wrong': the graph is not well formed: .*before it"):
        list(run(work, (*alone("weight methods"), Pass("wrong", reads_ahead)), Timings()))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (Pass("wrong", inserts, graph=False), "the graph is another, which this pass may not change"),
        (Pass("wrong", adds_a_tensor), "proj.more is another tensor, which this pass may not change"),
        (Pass("wrong", replaces_a_tensor), "proj.lora.A is another tensor, which this pass may not change"),
        (Pass("wrong", thaws), "proj.bias and 0 more learn unplanned, or do not"),
    ],
)
def test_a_pass_is_held_to_what_it_says_of_itself(wrong: Pass, reason: str) -> None:
    work = Work.on(plan_of(Layer, LORA))
    with pytest.raises(peftc.PeftcError) as caught:
        list(run(work, (*alone("materialise"), wrong), Timings()))
    (told,) = caught.value.diagnostics
    assert (told.code, told.title) == ("verifier-failed", f"peftc broke the graph in pass 'wrong': {reason}")


@pytest.mark.parametrize("wrong", [inserts, adds_a_tensor])
def test_a_pass_may_change_what_it_says(wrong: Callable[[Work], Any]) -> None:
    work = Work.on(plan_of(Layer, LORA))
    *_, (name, _) = run(work, (*alone("materialise"), Pass("right", wrong, tensors=True)), Timings())
    assert name == "right"


def test_nothing_learns_before_the_tensors_are_there() -> None:
    work = Work.on(plan_of(Layer, "train bias\n"))
    with pytest.raises(peftc.PeftcError, match=r"pass 'early': proj\.bias and 0 more learn unplanned"):
        list(run(work, [Pass("early", thaws)], Timings()))
