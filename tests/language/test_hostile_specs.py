"""Specifications made to break the reader: long, deep, ambiguous; and whether carets stand where they should."""

import dataclasses
import fnmatch
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import peftc
from drawn import NOWHERE, SIGNS, WORDS, only_diagnostics, read, selector, statements
from paths import GOLDEN
from peftc import language as syntax
from peftc.diagnostics.diagnostic import MOST_MISTAKES, Diagnostic, PeftcError
from peftc.diagnostics.source import Source
from peftc.language import Glob, Node, Selector, Spec, Statement, Value, parse_file, unparse


def mistakes(text: str) -> tuple[Diagnostic, ...]:
    try:
        read(text)
    except PeftcError as error:
        return error.diagnostics
    return ()


# --- spans --------------------------------------------------------------------------------------------------------


def nodes(item: object) -> Iterator[Node]:
    if isinstance(item, Node):
        yield item
        for field in dataclasses.fields(item):
            yield from nodes(getattr(item, field.name))
    elif isinstance(item, tuple):
        for inner in item:
            yield from nodes(inner)


def read_alone(node: Node) -> Node | None:
    """What the text below a node's span says when it stands alone."""
    match node:
        case Statement():
            return read(node.span.text).statements[0]
        case Selector():
            return selector(f"({node.span.text})")
        case syntax.Call(name=syntax.Name("checkpoint")):
            return node  # of a `fit`: a word of the language, which stands alone nowhere
        case syntax.Call() if "(" not in node.span.text:
            return read(f"apply {node.span.text}").statements[0].method  # type: ignore[attr-defined, no-any-return]
        case syntax.Name():
            assert node.span.text == node.text
        case Value():
            (statement,) = read(f"apply f(x={node.span.text})").statements
            return statement.method.args[0].value  # type: ignore[attr-defined, no-any-return]
    return node


@given(st.lists(statements, max_size=3), st.sampled_from(["", "\ufeff", "# \U0001f600é\r\n"]))
def test_the_span_of_a_node_is_its_text(items: list[Statement], before: str) -> None:
    spec = read(before + unparse(Spec(tuple(items), Source("", ""), **NOWHERE)))
    for node in nodes(spec.statements):
        assert read_alone(node) == node


QUOTED = ("word", "text", "unit", "escape", "character", "bracket", "operator", "verb")


def check_carets(text: str) -> None:
    """What a diagnostic says is wrong is what its span shows."""
    for problem in mistakes(text):
        assert problem.span
        assert 0 <= problem.span.start <= problem.span.end <= len(text)
        said = [getattr(problem, name, "") for name in QUOTED if problem.code != "missing-word"]
        assert all(words in problem.span.text for words in said), problem


@given(st.lists(st.sampled_from([*WORDS, *SIGNS, "8 q", "a*b.c", '"\\q"', "\u0430b", "\U0001f600"])))
def test_carets(words: list[str]) -> None:
    check_carets(" ".join(words))
    check_carets("".join(words))


GOLDENS = [path.read_bytes().decode() for path in sorted((GOLDEN / "spec" / "syntax").glob("*.peft"))]


@given(st.sampled_from(GOLDENS), st.data())
def test_damaged_goldens(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 9)))
    damaged = text[:start] + data.draw(st.sampled_from(["", *SIGNS])) + text[end:]
    only_diagnostics(damaged)
    check_carets(damaged)


# --- limits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "train {}",
        "train {}é",
        "train {}.",
        "train {}*",
        "apply f({})",
        'use "{}"',
        'train "{}"',
        "train /{}/",
        "let {} = norm",
        "train norm in {}",
        "train norm {}",
    ],
)
def test_words_have_a_longest(text: str) -> None:
    assert [problem.code for problem in mistakes(text.format("1" * 5000))] == ["too-long"]


def test_many_mistakes_in_one_statement() -> None:
    """They come from the builder, which does not stop by itself."""
    found = [problem.code for problem in mistakes(r'train "a", ' + r'"\q", ' * 1000 + "b")]
    assert found == ["bad-escape"] * MOST_MISTAKES + ["too-many-mistakes"]


def test_the_operators_of_a_budget_with_a_verb_among_its_parameters() -> None:
    (problem,) = mistakes("require memory(train=1) = 3")
    assert problem.notes == ("comparisons here: <= < >= > ==",)


# --- name patterns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "*a" * 1000,
        "{*,a*}" * 9,
        ".".join(["**", "*a*"] * 500),
        "**.x*." * 500 + "b",
        "{a,a}" * 9,
        ".".join(["*"] * 2000),
    ],
)
@pytest.mark.parametrize("path", ["a" * 300, "a." * 150 + "a", "xa." * 100 + "c"])
def test_name_patterns_match_in_reasonable_time(pattern: str, path: str) -> None:
    selected = selector(f'"{pattern}"')
    assert isinstance(selected, Glob)
    start = time.process_time()
    selected.regex().fullmatch(path)
    assert time.process_time() - start < 2


def test_choices_are_limited() -> None:
    (problem,) = mistakes('train "' + "{a,b}" * 10 + '"')
    assert problem.code == "bad-name-pattern"


def matches(pattern: list[str], path: list[str]) -> bool:
    """The definition of a name pattern without choices."""
    if not pattern:
        return not path
    first, *rest = pattern
    if first == "**":
        return any(matches(rest, path[start:]) for start in range(len(path) + 1))
    if not path or (first == "*" and not path[0]):
        return False
    return fnmatch.fnmatchcase(path[0], first) and matches(rest, path[1:])


segments = st.one_of(
    st.just(["**"]),
    st.lists(st.sampled_from(["a", "b", "ab", "a*", "*b", "*a*", "a*b*a", "*", "a.b", "*.a"]), min_size=1, max_size=3),
)
paths = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=6)


@given(st.lists(segments, min_size=1, max_size=5), paths)
def test_name_patterns_match_by_their_definition(choices: list[list[str]], path: list[str]) -> None:
    text = ".".join(f"{{{','.join(choice)}}}" if len(choice) > 1 else choice[0] for choice in choices)
    selected = selector(f'"{text}"')
    assert isinstance(selected, Glob)
    wanted = any(matches(".".join(spelt_out).split("."), path) for spelt_out in itertools.product(*choices))
    assert bool(selected.regex().fullmatch(".".join(path))) == wanted


# --- files --------------------------------------------------------------------------------------------------------


def codes(path: Path) -> list[str]:
    with pytest.raises(PeftcError) as raised:
        parse_file(path)
    return [problem.code for problem in raised.value.diagnostics]


def test_use_in_a_text_without_a_file() -> None:
    """There is no folder to look in; the one peftc happens to run in is not meant."""
    problems = [*peftc.check('train norm\nuse "x.peft"')]
    assert [problem.code for problem in problems] == ["use-without-file"]


def test_use_beside_a_link(tmp_path: Path) -> None:
    """What counts is the folder of the path that was given, wherever the file itself lies."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    (tmp_path / "there" / "main.peft").write_text('use "part.peft"')
    (tmp_path / "here" / "main.peft").symlink_to(tmp_path / "there" / "main.peft")
    (tmp_path / "here" / "part.peft").write_text("train norm")
    assert parse_file(tmp_path / "here" / "main.peft")
    assert codes(tmp_path / "there" / "main.peft") == ["unreadable-file"]


def test_no_way_out_of_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside.peft"
    outside.write_text("train norm")
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    (tmp_path / "inside-too").mkdir()
    (tmp_path / "inside-too" / "x.peft").write_text("train norm")
    (inside / "up").symlink_to(tmp_path)
    (inside / "deep").symlink_to(inside / "sub")
    ways = ["../outside.peft", "sub/../../outside.peft", "up/outside.peft", "deep/../../outside.peft", str(outside)]
    for way in [*ways, "../inside-too/x.peft", "..", "up"]:
        (inside / "main.peft").write_text(f'use "{way}"')
        assert codes(inside / "main.peft") == ["use-outside"]
    for way in ["", ".", "sub", "\\u0000", "a" * 4000, "main.peft/x"]:
        (inside / "main.peft").write_text(f'use "{way}"')
        assert codes(inside / "main.peft") == ["unreadable-file"]


def test_paths_that_cannot_be_resolved(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert codes(tmp_path / "loop") == ["unreadable-file"]
    assert codes(tmp_path / "loop" / "main.peft") == ["unreadable-file"]
    assert codes(tmp_path / "a\0b") == ["unreadable-file"]


def test_a_file_used_twice_has_its_mistakes_once(tmp_path: Path) -> None:
    (tmp_path / "main.peft").write_text('use "bad.peft"\ntask a {\n    use "bad.peft"\n}')
    (tmp_path / "bad.peft").write_text("train")
    assert codes(tmp_path / "main.peft") == ["missing-selector"]
