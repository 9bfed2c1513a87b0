"""A model that checks what it is given, such as `assert lengths.max() <= size`, is captured with the check.

Nobody knows in a trace how such a branch goes, as it is by numbers. But where one way raises, the graph is that of the
other, and raises, too, when it runs and the numbers say so.
"""

from __future__ import annotations

import dis
import linecache
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from transformers.exporters.utils import patch_attributes

OURS = tuple(f"{folder}/" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
ASSERTED = re.compile(r"Runtime assertion failed for expression (.*) on node ")
RAISES = "RAISE_VARARGS"
ENDS = ("RETURN_VALUE", "RETURN_CONST", "RERAISE")


@contextmanager
def checks_deferred() -> Iterator[dict[str, str]]:
    """While it is open, a branch on numbers of which one way raises goes the other way, and the graph asserts it.

    Yields:
        Of each expression that it asserts, the line of the model that does.
    """
    places: dict[str, str] = {}

    def deferring(answer: Callable[..., sympy.Basic]) -> Callable[..., sympy.Basic]:
        def evaluate_expr(env: ShapeEnv, asked: sympy.Basic, *args: Any, **kwargs: Any) -> sympy.Basic:
            try:
                return answer(env, asked, *args, **kwargs)
            except GuardOnDataDependentSymNode:
                frame = _asking(sys._getframe(1))
                holds = None if frame is None or _is_caught(frame) else must_be(frame.f_code, frame.f_lasti)
                if holds is None or frame is None:
                    raise
                true = asked if holds else sympy.Not(asked)
                env.guard_or_defer_runtime_assert(true, "")
                line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
                places[str(true)] = f"{frame.f_code.co_filename}:{frame.f_lineno}: {line}"
                return sympy.true if holds else sympy.false

        return evaluate_expr

    with patch_attributes([(ShapeEnv, "evaluate_expr", deferring)]):
        yield places


def tell_where(graph: fx.Graph, places: Mapping[str, str]) -> None:
    """What the graph says where a check fails: the model's line."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default):
        if (known := ASSERTED.match(str(node.args[1]))) and known[1] in places:
            node.args = (node.args[0], f"the model's own check fails: {places[known[1]]}")


def _asking(frame: FrameType | None) -> FrameType | None:
    """The innermost frame of a model's code."""
    while frame is not None and frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    return frame


def _is_caught(frame: FrameType) -> bool:
    """Whether the file that checks has an `except` around it: then it goes on where the check fails."""
    at: FrameType | None = frame
    while at is not None:
        same = at.f_code.co_filename == frame.f_code.co_filename
        if same and any(map(partial(_catches, at.f_code), _handlers(at.f_code, at.f_lasti))):
            return True
        at = at.f_back
    return False


def _handlers(code: CodeType, place: int) -> list[int]:
    """Where it goes on after an error at a place."""
    entries: Any = dis.Bytecode(code).exception_entries  # type: ignore[attr-defined]
    return [entry.target for entry in entries if entry.start <= place < entry.end]


def _catches(code: CodeType, handler: int) -> bool:
    """Whether a handler is that of an `except`, and not of a `with` or a `finally`, which raise the error again."""
    for each in dis.get_instructions(code):
        if each.offset < handler:
            continue
        if each.opname in ("WITH_EXCEPT_START", "RERAISE"):
            return False
        if each.opname in ("CHECK_EXC_MATCH", "CHECK_EG_MATCH", "POP_EXCEPT"):
            return True
    return False


def must_be(code: CodeType, place: int) -> bool | None:
    """What the condition of the branch at a place must be, that nothing is raised; None where both ways go on."""
    instructions = list(dis.get_instructions(code))
    offsets = [each.offset for each in instructions]
    at = offsets.index(place) if place in offsets else 0
    at += instructions[at].opname == "TO_BOOL"
    if not instructions[at].opname.endswith(("IF_TRUE", "IF_FALSE")):
        return None
    branch = instructions[at]
    jumps_if = branch.opname.endswith("IF_TRUE")
    onward, away = (_raises(instructions[start:]) for start in (at + 1, offsets.index(branch.argval)))
    return None if onward == away else jumps_if if onward else not jumps_if


def _raises(instructions: list[dis.Instruction]) -> bool:
    """Whether they end in an error, without another branch before."""
    for each in instructions:
        if each.opname == RAISES:
            return True
        if each.opname in ENDS or "JUMP" in each.opname:
            return False
    return False
