"""`peftc sites`: what a model offers to selectors."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

import peftc
from peftc.cli.common.command import Argument, Command, Lazy
from peftc.cli.common.inputs import JSON, MODEL, TRUST
from peftc.cli.common.output import print_json, progress

if TYPE_CHECKING:
    from peftc.show import tables
else:
    tables = Lazy("peftc.show.tables")


def run(given: Namespace) -> None:
    """The tree of sites with their roles, and what has none."""
    with progress(given):
        found = peftc.sites(given.model, trust_remote_code=given.trust_remote_code)
    if given.json:
        print_json(
            {"model": found.model, "sites": found.to_json(), "absent": [item.to_json() for item in found.absent]}
        )
        return
    absent = tables.absences(found, every=given.all)
    tables.print_all(tables.sites_tree(found, every=given.all), *([absent] if absent else []))


SITES = Command(
    "sites",
    run,
    (MODEL, JSON, Argument("--all", action="store_true", help="every layer, not the first of each stack alone"), TRUST),
)
