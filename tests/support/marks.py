"""Marks on the cases of a test."""

import shutil
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest

F = TypeVar("F", bound=Callable[..., None])


def first_is_quick(cases: Sequence[Any]) -> list[Any]:
    """The cases, all but the first of them marked slow: whether it works at all shows in the first."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*value, marks=[pytest.mark.slow] if place else []) for place, value in enumerate(values)]


def by_inductor(test: F) -> F:
    """A test that has code generated, and the warnings that torch's own imports give."""
    marks = (
        pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler"),
        pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    )
    for mark in marks:
        test = mark(test)
    return test
