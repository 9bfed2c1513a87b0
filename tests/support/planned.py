"""Zoo models captured once, and plans of specs on them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from peftc.capture.capture import Captured, capture
from peftc.capture.inputs import example_inputs
from peftc.planning.plan import Plan
from peftc.planning.planner import make_plan
from peftc.protocol.sites import Sites
from peftc.roles.assign import find_sites
from peftc.spec.check import intend
from zoo import ZOO


@cache
def captured(model: str) -> tuple[Captured, Sites]:
    """A zoo model captured once for all tests of a process: planning leaves the graph as it is."""
    built = ZOO[model]()
    found = capture(built, example_inputs(built))
    return found, find_sites(found)


def plan(model: str, spec: str | Path) -> Plan:
    return make_plan(*captured(model), intend(spec))


def together(model: str) -> pytest.MarkDecorator:
    """One worker of pytest-xdist gets all tests of a model, which it captures once."""
    return pytest.mark.xdist_group(f"plan-{model}")
