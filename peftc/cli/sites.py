"""`peftc sites`: what a model offers to selectors."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

import peftc
from peftc.cli.common.command import Argument, Command
from peftc.cli.common.inputs import JSON, LABELS, MODEL, TASK, TRUST, model_named
from peftc.cli.common.output import print_json, progress
from peftc.diagnostics.lazy import Lazy

if TYPE_CHECKING:
    from peftc.show import screen, tables
else:
    screen, tables = Lazy("peftc.show.screen"), Lazy("peftc.show.tables")


def run(given: Namespace) -> None:
    """The tree of sites with their roles, and what has none."""
    with progress(given):
        model = model_named(given)
        found = peftc.sites(model)
    if given.json:
        print_json(
            {"model": found.model, "sites": found.to_json(), "absent": [item.to_json() for item in found.absent]}
        )
        return
    absent = tables.absences(found, every=given.all)
    screen.print_all(tables.sites_tree(found, every=given.all), *([absent] if absent else []))


COMMAND = Command(
    "sites",
    run,
    (
        MODEL,
        JSON,
        Argument("--all", action="store_true", help="every layer, not the first of each stack alone"),
        TASK,
        LABELS,
        TRUST,
    ),
)
