"""`peftc explain`: what a line matches and why, or what a name is and which lines reach it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from peftc.cli.common.command import Argument, Command
from peftc.cli.common.inputs import JSON, LABELS, MODEL, SPEC, TASK, TRUST, checked_spec, model_named
from peftc.cli.common.output import print_json, progress
from peftc.diagnostics.lazy import Lazy

if TYPE_CHECKING:
    from peftc import api
    from peftc.driver import explain
    from peftc.show import screen
else:
    api, explain, screen = Lazy("peftc.api"), Lazy("peftc.driver.explain"), Lazy("peftc.show.screen")


def run(given: Namespace) -> None:
    """What each line matches and leaves out; of one place its roles, the evidence, and the lines that reach it."""
    with progress(given) as timings:
        spec = checked_spec(given, timings)
        model = model_named(given)
        if spec.fits:
            plan = api.plan(model, spec)
            explainer = explain.Explainer(plan.sites, plan.intentions, plan.fitted)
        else:
            explainer = explain.Explainer(api.sites(model), spec)
    asked, file = given.asked, str(Path(given.spec))
    line = None if not asked or given.place or not asked.isdecimal() else int(asked)
    if line == 0 or (asked and line is None):  # lines count from 1
        found: list[explain.Reason] | list[explain.Matched] = explainer.name(asked)
    else:
        found = explainer.line(line, file)
    if given.json:
        print_json(explainer.to_json(found))
    else:
        screen.print_all("\n".join(explain.told(found)))


COMMAND = Command(
    "explain",
    run,
    (
        SPEC,
        MODEL,
        Argument("asked", nargs="?", metavar="LINE|NAME", help="a line of the spec, or the end of a place's name"),
        Argument("--place", action="store_true", help="what is asked for is a place, even where its name is a number"),
        JSON,
        TASK,
        LABELS,
        TRUST,
    ),
)
