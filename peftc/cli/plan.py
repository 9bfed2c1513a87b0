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
    from peftc.distributed import fsdp, ranks
    from peftc.show import screen, tables
else:
    fsdp, ranks = Lazy("peftc.distributed.fsdp"), Lazy("peftc.distributed.ranks")
    screen, tables = Lazy("peftc.show.screen"), Lazy("peftc.show.tables")


def run(given: Namespace) -> None:
    """What each statement matches, and what a step needs, from shapes alone."""
    with progress(given) as timings:
        spec = checked_spec(given, timings)
        model = model_named(given)
        plan = peftc.plan(model, spec, dtype=given.dtype, timings=timings)
    memory = plan.memory(given.batch, given.seq, given.optimizer)
    each = None
    if given.shard or given.ranks > 1:
        if given.shard:
            fsdp.refuse(plan)
        each = ranks.by_rank(plan, given.ranks, given.batch, given.seq, given.optimizer, shard=given.shard)
    if given.json:
        by_rank = {"ranks": each.to_json()} if each is not None else {}
        print_json(plan.to_json() | {"memory": memory.to_json()} | by_rank | {"seconds": timings.seconds})
        return
    screen.print_all(tables.plan_table(plan), tables.memory_table(memory, given.batch, given.seq, given.optimizer))
    if each is not None:
        print("\n".join(each.lines()))


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
        Argument("--ranks", type=positive, default=1, help="processes, each with a batch of its own: bytes by rank"),
        Argument("--shard", action="store_true", help="weights in parts over the processes, as peftc.shard has them"),
        TASK,
        LABELS,
        DTYPE,
        TRUST,
    ),
)
