"""`peftc plan`: what compiling would do, and the memory that a training step would take."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

import peftc
from peftc.cli.common.command import Argument, Command
from peftc.cli.common.inputs import DTYPE, JSON, LABELS, MODEL, SPEC, TASK, TRUST, checked_spec, model_named, positive
from peftc.cli.common.output import print_json, progress
from peftc.diagnostics.lazy import Lazy
from peftc.planning.memory import STATE_BYTES

if TYPE_CHECKING:
    from peftc.show import screen, tables
else:
    screen, tables = Lazy("peftc.show.screen"), Lazy("peftc.show.tables")


def run(given: Namespace) -> None:
    """What each statement matches, and what a step needs, from shapes alone."""
    with progress(given) as timings:
        spec = checked_spec(given, timings)
        model = model_named(given)
        plan = peftc.plan(model, spec, dtype=given.dtype, timings=timings)
    memory = plan.memory(given.batch, given.seq, given.optimizer)
    if given.json:
        print_json(plan.to_json() | {"memory": memory.to_json(), "seconds": timings.seconds})
        return
    screen.print_all(tables.plan_table(plan), tables.memory_table(memory, given.batch, given.seq, given.optimizer))


COMMAND = Command(
    "plan",
    run,
    (
        SPEC,
        MODEL,
        JSON,
        Argument("--batch", type=positive, default=1, help="examples in a step, for the memory table"),
        Argument("--seq", type=positive, default=512, help="tokens in an example, for the memory table"),
        Argument("--optimizer", choices=tuple(STATE_BYTES), default="adamw", help="for the memory table"),
        TASK,
        LABELS,
        DTYPE,
        TRUST,
    ),
)
