"""Methods that meet: every two of them on one place work together, or are refused with a reason."""

from __future__ import annotations

from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest

import peftc
from claims import (
    comes_back_from_disk,
    learns_what_it_declares_and_nothing_else,
    merges_or_says_why_not,
    starts_as_the_base,
)
from paths import ROOT
from peftc.protocol.method import Stage
from peftc.spec.check import as_spec
from peftc.spec.resolve import resolve
from subjects import compiled, subject
from variants import DEFAULTS, built, home, statement

TRAININGS = ("train norm", "train linear")
PLAINEST = [*map(statement, DEFAULTS), "train norm"]


def stage(line: str) -> int:
    """When the line's method acts; only within a stage does the order of the file matter."""
    return 0 if line in TRAININGS else built(variant_of(line)).stage


def method_of(line: str) -> str:
    return "train" if line in TRAININGS else variant_of(line).partition("(")[0]


def variant_of(line: str) -> str:
    return line.removeprefix("apply ").partition(" to ")[0]


def meetings(lines: list[str]) -> list[str]:
    """Every two lines about different methods, the one that acts first in front."""
    pairs = [pair for pair in combinations(sorted(lines, key=stage), 2) if method_of(pair[0]) != method_of(pair[1])]
    return ["\n".join(pair) for pair in pairs]


def contradiction(spec: str) -> str | None:
    """The code of the refusal where a method that wants something to itself meets what all of these stand on."""
    lines = spec.splitlines()
    applied = [application.method for application in resolve(as_spec(spec)).applications]
    if len(lines) > 1 and any(method.claims_upstream() for method in applied):
        return "gradient-claimed"
    on_weights = [method for method in applied if method.stage is Stage.WEIGHT]
    shared = len(on_weights) + ("train linear" in lines) > 1
    return "weight-claimed" if shared and any(method.claims_weight() for method in on_weights) else None


def meeting(name: str, spec: str, *marks: pytest.MarkDecorator) -> Any:
    return pytest.param(name, spec, id=f"{name}: {' / '.join(spec.splitlines())}",
                        marks=[pytest.mark.xdist_group(f"meetings-{name}"), *marks])  # fmt: skip


def subject_of(spec: str) -> str:
    """The smallest model that every line can be tried on."""
    homes = {home(variant_of(line)) for line in spec.splitlines() if line not in TRAININGS}
    return "llama" if "llama" in homes else "plain"


QUICK_MEETINGS = [("llama", f"{statement('lora')}\n{statement('adapter')}")]
FULL_MEETINGS = [
    *((subject_of(spec), spec) for spec in meetings(PLAINEST) if not contradiction(spec)),
    # of one fused weight, each has rows of its own
    ("gpt2", "apply dora to attn.q\napply lora to attn.k"),
    ("gpt2", "apply lora(init=pissa) to attn.q\napply dora to attn.k, mlp.down"),
]


@pytest.mark.parametrize(
    ("name", "spec"),
    [meeting(*case) for case in QUICK_MEETINGS]
    + [meeting(*case, pytest.mark.slow) for case in FULL_MEETINGS if case not in QUICK_MEETINGS],
)
def test_7_two_that_meet(name: str, spec: str, tmp_path: Path) -> None:
    if all(application.method.identity for application in resolve(as_spec(spec)).applications):
        starts_as_the_base(compiled(name, spec))
    learns_what_it_declares_and_nothing_else(compiled(name, spec))
    merges_or_says_why_not(compiled(name, spec))
    comes_back_from_disk(compiled(name, spec), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "spec"), [meeting(subject_of(spec), spec) for spec in meetings(PLAINEST) if contradiction(spec)]
)
def test_7_what_one_claims_is_shared_with_nothing(name: str, spec: str) -> None:
    """Whatever the order in the file, the refusal shows both lines."""
    for lines in permutations(spec.splitlines()):
        with pytest.raises(peftc.PeftcError) as raised:
            peftc.plan(subject(name).base, "\n".join(lines), example=subject(name).example)
        assert {diagnostic.code for diagnostic in raised.value.diagnostics} == {contradiction(spec)}
        assert all(line in str(raised.value) for line in lines)


@pytest.mark.xdist_group("conformance-plain")
@pytest.mark.slow
def test_7_all_at_once(tmp_path: Path) -> None:
    """Every method that shares, and an existing parameter, in one model."""
    sharing = [v for v in DEFAULTS if not (built(v).claims_weight() or built(v).claims_upstream())]
    sharing = [statement(variant) for variant in sharing if home(variant) == "plain"]
    spec = "\n".join(["train norm, head", *sharing])
    test_7_two_that_meet("plain", spec, tmp_path)


# ---- The table of pairs ---------------------------------------------------------------------------------------------

TABLE = ROOT / "passes" / "README.md"
BEGIN, END = "<!-- pairs: begin -->\n", "<!-- pairs: end -->"


def outcome(spec: str) -> tuple[str, str]:
    """M where the two work together and merge, W where they work, and else the refusal with its reason."""
    try:
        peftc.plan(subject("llama").base, spec)
    except peftc.PeftcError as error:
        problem = error.diagnostics[0]
        return "", f"{getattr(problem, 'method', '')}: {getattr(problem, 'reason', problem.title)}"
    methods = [application.method for application in resolve(as_spec(spec)).applications]
    return ("W" if any(method.unmergeable for method in methods) else "M"), ""


def pairs_markdown() -> str:
    """Half of a square, for the order in the file makes no difference; each refusal's reason below it."""
    lines = sorted(PLAINEST, key=method_of)
    names = [variant_of(line).partition("(")[0] if line not in TRAININGS else line for line in lines]
    reasons: list[str] = []
    rows = [f"| | {' | '.join(str(place + 1) for place in range(len(lines) - 1))} |", "|---" * len(lines) + "|"]
    for place, line in enumerate(lines):
        cells = []
        for other in lines[:place]:
            symbol, reason = outcome(f"{other}\n{line}")
            if reason and reason not in reasons:
                reasons.append(reason)
            cells.append(symbol or f"[{reasons.index(reason) + 1}]")
        rows.append(f"| {place + 1} `{names[place]}` | {' | '.join(cells + [''] * (len(lines) - 1 - place))} |")
    notes = [f"{place + 1}. {reason}" for place, reason in enumerate(reasons)]
    stand = [f"{place + 1}. `{line}`" for place, line in enumerate(lines)]
    return "\n".join([*rows, "", "Refused:", "", *notes, "", "The statements:", "", *stand])


@pytest.mark.xdist_group("conformance-llama")
@pytest.mark.slow
def test_the_table_of_pairs_is_what_a_plan_says(request: pytest.FixtureRequest) -> None:
    """That what the table says works does work is `test_7_two_that_meet`, pair by pair."""
    text = TABLE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    if request.config.getoption("--update-golden"):
        TABLE.write_text(f"{before}{BEGIN}{pairs_markdown()}\n{END}{after}", encoding="utf-8")
        return
    assert table.strip() == pairs_markdown(), "pytest --update-golden writes it anew"
