"""Any text is a specification or has diagnostics: random and damaged ones; and what is written reads back."""

import re

from hypothesis import given
from hypothesis import strategies as st

from drawn import NOWHERE, SIGNS, WORDS, globs, only_diagnostics, read, statements
from peftc import language as syntax
from peftc.diagnostics.source import Source
from peftc.language import (
    Glob,
    Spec,
    unparse,
)


@given(st.text())
def test_random_text(text: str) -> None:
    only_diagnostics(text)


@given(st.lists(st.sampled_from([*WORDS, *SIGNS])))
def test_random_words(words: list[str]) -> None:
    only_diagnostics(" ".join(words))
    only_diagnostics("".join(words))


@given(st.data())
def test_damaged_specifications(data: st.DataObject) -> None:
    text = unparse(Spec(tuple(data.draw(st.lists(statements, max_size=4))), Source("", ""), **NOWHERE))
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 5)))
    only_diagnostics(text[:start] + data.draw(st.sampled_from(["", *SIGNS])) + text[end:])


@given(st.lists(statements, max_size=4))
def test_unparse_and_parse(items: list[syntax.Statement]) -> None:
    spec = Spec(tuple(items), Source("", ""), **NOWHERE)
    text = unparse(spec)
    assert read(text) == spec
    assert unparse(read(text)) == text
    assert len(text.splitlines()) >= len(items)


@given(globs)
def test_name_patterns_compile(pattern: Glob) -> None:
    assert isinstance(pattern.regex(), re.Pattern)
