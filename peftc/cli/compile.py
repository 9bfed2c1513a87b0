"""`peftc compile`: a spec and a model to an artifact."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

import peftc
from peftc.cli.common.command import Argument, Command
from peftc.cli.common.inputs import (
    CALIBRATION,
    DTYPE,
    JSON,
    LABELS,
    MODEL,
    RANDOM_WEIGHTS,
    SPEC,
    TASK,
    TRUST,
    calibration_batches,
    checked_spec,
    model_to_compile,
)
from peftc.cli.common.output import print_json, progress
from peftc.diagnostics.lazy import Lazy
from peftc.diagnostics.render import visible

if TYPE_CHECKING:
    from peftc.show import screen, tables
else:
    screen, tables = Lazy("peftc.show.screen"), Lazy("peftc.show.tables")


def run(given: Namespace) -> None:
    """Compiles, verifies, reports; with -o writes the artifact."""
    with progress(given) as timings:
        spec = checked_spec(given, timings)
        batches = calibration_batches(given)
        model, example = model_to_compile(given, timings, given.dtype)
        compiled = peftc.compile(
            model, spec, example=example, calibration=batches,
            dtype=given.dtype, trust_remote_code=given.trust_remote_code, timings=timings,
        )  # fmt: skip
        if given.output:
            with timings.stage("save"):
                compiled.save(given.output)
    if given.json:
        told = [fired.to_json() for fired in compiled.face().fired]
        rest = {"fusions": told, "seconds": timings.seconds, "artifact": given.output, "notes": compiled.notes()}
        print_json(compiled.plan.to_json() | rest)
        return
    fusions = tables.fusions_table(compiled.face().fired, every=given.verbose)
    screen.print_all(tables.plan_table(compiled.plan), *([fusions] if fusions else []), *compiled.notes())
    if given.timings:
        screen.print_all(tables.timings_table(timings.seconds))
    if given.output:
        print(f"written to {visible(given.output)}")


COMMAND = Command(
    "compile",
    run,
    (
        SPEC,
        MODEL,
        JSON,
        Argument("-o", "--output", metavar="DIR", help="write the artifact here"),
        CALIBRATION,
        Argument("--timings", action="store_true", help="print seconds by stage, and what capture alone takes"),
        Argument("--verbose", action="store_true", help="print the fusions, too, that there is nothing for"),
        RANDOM_WEIGHTS,
        TASK,
        LABELS,
        DTYPE,
        TRUST,
    ),
)
