"""`peftc check`: everything wrong with a spec that can be known without a model."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import peftc
from peftc.cli.common.command import Command
from peftc.cli.common.inputs import JSON, SPEC
from peftc.cli.common.output import complain, print_json
from peftc.diagnostics.diagnostic import PeftcError


def run(given: Namespace) -> int:
    """Diagnostics without a model."""
    problems = peftc.check(Path(given.spec))
    if given.json:
        print_json({"errors": [problem.to_json() for problem in problems]})
    elif problems:
        complain(PeftcError(*problems), as_json=False)
    else:
        print(f"{given.spec}: no errors")
    return 1 if problems else 0


COMMAND = Command("check", run, (SPEC, JSON))
