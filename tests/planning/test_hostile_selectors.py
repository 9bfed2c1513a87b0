"""Specs made to hang the planner: expressions that backtrack, names that double, thousands of mistakes."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import peftc
from peftc.diagnostics.diagnostic import MOST_MISTAKES
from peftc.language import matching
from peftc.language.matching import Clock, compiled
from peftc.planning.select import Selection
from peftc.protocol.site import Site
from peftc.protocol.sites import Sites
from peftc.spec.check import as_spec
from peftc.spec.resolve import resolve


def model(layers: int = 24) -> Sites:
    """Two sites a layer, and as many parameters."""
    paths = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(layers) for name in "qv"]
    sites = [
        Site(path, path, frozenset({f"attn.{path[-6]}"}), parameters=(f"{path}.weight",), layer=int(path.split(".")[2]),
             block=path.rpartition(".self")[0])
        for path in paths
    ]  # fmt: skip
    return Sites("Model", tuple(sites), parameters={f"{path}.weight": 1 for path in paths})


def train(text: str, layers: int = 24) -> tuple[list[Site], Selection]:
    """What the last `train` statement of a spec means, within two seconds."""
    began = time.process_time()
    selection = Selection(model(layers))
    found: list[Site] = []
    for training in resolve(as_spec(text)).trainings:
        found = selection(training.target, parameters=True)
    assert time.process_time() - began < 2
    return found, selection


@pytest.mark.parametrize(
    "pattern", ["(([a-z_.0-9])+)+[!?]", "(a|b|[a-z._0-9]|.)*[!?]", "(?:(?:.{1,30}){1,30}){1,30}[!?]"]
)
def test_expressions_that_backtrack(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "SECONDS", 0.2)
    text = "\n".join(f"train /{pattern}{number}/" for number in range(20))
    with pytest.raises(peftc.PeftcError) as raised:
        train(text)
    *others, problem = raised.value.diagnostics
    assert problem.code == "slow-pattern"
    assert {other.code for other in others} <= {"no-match"}  # of those before
    assert problem.span is not None


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"a{e}", "a{e}"),
        (r"a{e<=1}b", "a{e<=1}b"),
        (r"x{2}", "xx"),
        (r"x{,2}y", "xxy"),
        (r"x{1,}y{}", "xxy{}"),
        (r"\{e\}", "{e}"),
        (r"[{e}]+", "{e}"),
        (r"[^]{e}]", "a"),
        (r"[\]{e}]{2}", "]{"),
    ],
)
def test_a_brace_means_what_it_means_in_python(pattern: str, text: str) -> None:
    assert re.fullmatch(pattern, text)
    assert compiled(f"^(?:{pattern})$").search(text)
    assert not compiled(f"^(?:{pattern})$").search(f"{text}!")


@given(st.text("ab{},2e<=[]^\\|()?*+.", max_size=8), st.lists(st.text("ab{}e2,", max_size=5), max_size=5))
def test_expressions_mean_what_they_mean_in_python(pattern: str, names: list[str]) -> None:
    try:
        own = re.compile(pattern)
    except re.error:
        return
    except (FutureWarning, OverflowError):
        return
    clock = Clock()
    assert [clock.found(compiled(pattern), name) for name in names] == [own.search(name) is not None for name in names]


@pytest.mark.parametrize(
    "step", ["{0}, {0}", "{0} & {0}", "({0} except attn.q), {0}", "(" + ", ".join(["{0}"] * 40) + ")"]
)
def test_names_that_double(step: str) -> None:
    lets = [f"let a{number} = {step.format(f'a{number - 1}')}" for number in range(1, 60)]
    found, selection = train("\n".join(["let a0 = attn.q, attn.v", *lets, "train a59"]))
    assert len(found) == 48
    assert not selection.problems


def test_a_name_without_meaning_is_told_of_once() -> None:
    lets = [f"let a{number} = a{number - 1}, a{number - 1}" for number in range(1, 60)]
    _, selection = train("\n".join(['let a0 = "nowhere"', *lets, "train a59", "train a59"]))
    (problem,) = selection.problems
    assert problem.span is not None
    assert problem.span.text == '"nowhere"'


@pytest.mark.parametrize("step", ["{} where in_features > 1", "{} except norm", "({}, attn.k) in layers[1:]"])
def test_names_within_names_have_a_greatest_depth(step: str) -> None:
    lets = [f"let a{number} = {step.format(f'a{number - 1}')}" for number in range(1, 1000)]
    found = peftc.check("\n".join(["let a0 = attn.q", *lets, "train a999"]))
    assert {problem.code for problem in found[:-1]} == {"too-deep"}
    assert len(found) == MOST_MISTAKES + 1 or len(found) < MOST_MISTAKES
    sound, _ = train(
        "\n".join(["let a0 = attn.q", *(f"let a{n} = a{n - 1} in layers[0:]" for n in range(1, 100)), "train a99"])
    )
    assert len(sound) == 24


def test_other_names_of_one_thing_are_not_deep() -> None:
    lets = [f"let a{number} = a{number - 1}" for number in range(1, 1000)]
    found, _ = train("\n".join(["let a0 = attn.q", *lets, "train a999"]))
    assert len(found) == 24


@pytest.mark.parametrize(
    "line",
    [
        'train "nowhere{}"',
        "train norm{}",
        "apply lora(x{}=1) to norm",
        "apply lora{} to norm",
        "let norm = mlp # {}",
        "group g{} = nowhere(layers)",
    ],
)
def test_thousands_of_mistakes(line: str) -> None:
    """The first hundred are told, and that there are more, whatever stage finds them."""
    text = "\n".join(line.format(number) for number in range(500))
    problems = peftc.check(text)
    if not problems:
        _, selection = train(text, layers=2)
        problems = list(peftc.PeftcError(*selection.problems).diagnostics)
    assert len(problems) == MOST_MISTAKES + 1
    assert problems[-1].code == "too-many-mistakes"


def test_other_names_of_one_method_are_not_deep() -> None:
    lets = [f"let a{number} = a{number - 1}()" for number in range(1, 1000)]
    text = "\n".join(["let a0 = lora(r=3)", *lets, "apply a999(alpha=4) to attn.q"])
    (application,) = resolve(as_spec(text)).applications
    (plain,) = resolve(as_spec("apply lora(r=3, alpha=4) to attn.q")).applications
    assert repr(application.method) == repr(plain.method)


def test_thousands_of_statements() -> None:
    found, selection = train("\n".join(f'train attn.q\ntrain "**.{number % 24}.**"' for number in range(1000)))
    assert found
    assert not selection.problems


def test_words_are_counted_with_those_of_used_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["peftc.language.parse"], "MOST_WORDS", 100)
    (tmp_path / "part.peft").write_text("train norm\n" * 20)
    (tmp_path / "main.peft").write_text('use "part.peft"\n')
    assert not peftc.check(tmp_path / "main.peft")
    (tmp_path / "main.peft").write_text('use "part.peft"\n' * 4)
    assert {problem.code for problem in peftc.check(tmp_path / "main.peft")} == {"too-many-words"}


@pytest.mark.parametrize(
    ("bounds", "has"),
    [
        ("9:2", False), ("0:0", False), (":0", False), ("-1:0", False), ("-2:-5", False), ("2:9:-1", False),
        ("3:3", False), (":-1:-1", False), ("9223372036854775806:1", False),
        ("9:2:-1", True), ("-5:2", True), ("5:-2", True), ("-1:", True), (":", True), ("::-1", True), ("7", True),
        ("-1", True), ("9223372036854775806:", True), ("0:9223372036854775806:3", True),
    ],
)  # fmt: skip
def test_slices_that_no_model_has(bounds: str, has: bool) -> None:
    found = peftc.check(f"train norm in layers[{bounds}]")
    assert [problem.code for problem in found] == ([] if has else ["bad-slice"])


@pytest.mark.parametrize(
    ("budget", "means"),
    [
        ("trainable <= 200%", False), ("trainable < -1", False), ("total > 100%", False), ("trainable >= 0", False),
        ("trainable <= 100%", False), ("memory < 0", False), ("trainable == 101%", False),
        ("trainable < 100%", True), ("trainable == 100%", True), ("trainable > 0", True), ("trainable <= 1K", True),
        ("memory <= 1 GiB", True), ("trainable == 0%", True),
    ],
)  # fmt: skip
def test_budgets_that_say_the_same_of_every_model(budget: str, means: bool) -> None:
    found = peftc.check(f"train norm\nrequire {budget}")
    assert [problem.code for problem in found] == ([] if means else ["empty-budget"])
