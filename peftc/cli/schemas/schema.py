"""`peftc schema`: of what commands print with `--json`, what a program can rely on."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from typing import TYPE_CHECKING

from peftc.cli.common.command import Argument, Command
from peftc.cli.common.output import print_json
from peftc.diagnostics.lazy import Lazy

if TYPE_CHECKING:
    from peftc.cli.schemas import derive, outputs
else:
    derive, outputs = Lazy("peftc.cli.schemas.derive"), Lazy("peftc.cli.schemas.outputs")


def run(given: Namespace) -> None:
    """The JSON schema of what a command prints with --json, or of each by name."""
    print_json(derive.schema(given.of) if given.of else {name: derive.schema(name) for name in outputs.OUTPUTS})


def with_schema(name: str) -> str:
    """The name of a command that prints data."""
    if name not in outputs.OUTPUTS:
        raise ArgumentTypeError(f"expects one of {', '.join(outputs.OUTPUTS)}, not {name!r}")
    return name


COMMAND = Command(
    "schema",
    run,
    (Argument("of", nargs="?", type=with_schema, metavar="COMMAND", help="one that takes --json"),),
)
