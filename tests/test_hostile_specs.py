"""Specifications made to break the reader: long, deep, ambiguous; and that every caret stands below what it is about."""

import dataclasses
import fnmatch
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import test_syntax
from peftc import syntax
from peftc.errors import Diagnostic, PeftcError
from peftc.syntax import Glob, Node, Selector, Spec, Statement, Value, parse, parse_file, unparse
from peftc.text import Source, Span

read, NOWHERE = test_syntax.read, test_syntax.NOWHERE
unhurried = settings(deadline=None)  # other processes may take the machine meanwhile


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
            return test_syntax.selector(f"({node.span.text})")
        case syntax.Call() if "(" not in node.span.text:
            return read(f"apply {node.span.text}").statements[0].method  # type: ignore[attr-defined, no-any-return]
        case Value():
            (statement,) = read(f"apply f(x={node.span.text})").statements
            return statement.method.args[0].value  # type: ignore[attr-defined, no-any-return]
    return node


@unhurried
@given(st.lists(test_syntax.statements, max_size=3), st.sampled_from(["", "\ufeff", "# \U0001f600é\r\n"]))
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


@unhurried
@given(st.lists(st.sampled_from([*test_syntax.WORDS, *test_syntax.SIGNS, "8 q", "a*b.c", '"\\q"', "\u0430b", "\U0001f600"])))
def test_carets(words: list[str]) -> None:
    check_carets(" ".join(words))
    check_carets("".join(words))


GOLDENS = [path.read_bytes().decode() for path in sorted(test_syntax.BAD.glob("*.peft"))]


@unhurried
@given(st.sampled_from(GOLDENS), st.data())
def test_damaged_goldens(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 9)))
    damaged = text[:start] + data.draw(st.sampled_from(["", *test_syntax.SIGNS])) + text[end:]
    test_syntax.only_diagnostics(damaged)
    check_carets(damaged)
