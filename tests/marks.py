"""Marks on the cases of a test."""

from collections.abc import Sequence
from typing import Any

import pytest


def first_is_quick(cases: Sequence[Any]) -> list[Any]:
    """The cases, all but the first of them marked slow: whether it works at all shows in the first."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*value, marks=[pytest.mark.slow] if place else []) for place, value in enumerate(values)]
