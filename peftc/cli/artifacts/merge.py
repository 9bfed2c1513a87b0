"""`peftc merge`: what was learned, folded into the weights."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING

import peftc
from peftc.cli.common.command import Argument, Command
from peftc.cli.common.errors import WhichTask
from peftc.cli.common.inputs import ARTIFACT_HELP, JSON, MODEL_HELP, TRUST
from peftc.cli.common.output import print_json, progress, quieten
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.lazy import Lazy
from peftc.diagnostics.render import visible

if TYPE_CHECKING:
    from peftc.files import merge, repack
    from peftc.show import screen, tables
else:
    merge = Lazy("peftc.files.merge")
    repack = Lazy("peftc.files.repack")
    screen, tables = Lazy("peftc.show.screen"), Lazy("peftc.show.tables")


def run(given: Namespace) -> None:
    """Folds an artifact into a plain model."""
    quieten()
    with progress(given) as timings:
        with timings.stage("compile"):
            compiled = peftc.load(given.artifact, given.model, trust_remote_code=given.trust_remote_code)
            if given.task is None and len(compiled.tasks) > 1:
                raise PeftcError(WhichTask(tasks=compiled.tasks))
            face = compiled.face(None if given.task is None else [given.task])
        with timings.stage("merge"):
            again = repack.repack(face) if given.requantize else repack.Repacked(face.merge(), {}, None)
            merged, lost = again.model, again.lost
        with timings.stage("save"):
            packed = merge.save_merged(merged, given.output, again.packing)
    if given.json:
        report = {"model": type(merged).__name__, "folder": given.output, "seconds": timings.seconds, "packed": packed}
        print_json(report | {"lost": {name: asdict(rounding) for name, rounding in lost.items()}})
    else:
        if lost:
            screen.print_all(tables.lost_table(lost))
        how = "packed for bitsandbytes, " if packed else "its weights rounded but not packed, " if lost else ""
        print(f"a plain {type(merged).__name__}, {how}written to {visible(given.output)}")


COMMAND = Command(
    "merge",
    run,
    (
        JSON,
        Argument(
            "artifact",
            metavar="DIR",
            help=ARTIFACT_HELP,
        ),
        Argument("-o", "--output", metavar="DIR", required=True, help="where the plain model goes"),
        Argument(
            "--requantize",
            action="store_true",
            help="quantise again what was, print what that loses, and write it as bitsandbytes packs it",
        ),
        Argument("--task", metavar="NAME", help="which of the artifact's tasks is folded in, where it has several"),
        Argument("--model", metavar="MODEL", help=f"the base model, if it moved: {MODEL_HELP}"),
        TRUST,
    ),
)
