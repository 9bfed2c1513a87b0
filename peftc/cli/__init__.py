"""The `peftc` command, one file a command. Exit status: 0 done, 1 a diagnostic, 2 wrong usage."""

from __future__ import annotations

import os
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Sequence

import peftc
from peftc.cli.bench import BENCH
from peftc.cli.check import CHECK
from peftc.cli.common.output import complain
from peftc.cli.compile import COMPILE
from peftc.cli.export import EXPORT
from peftc.cli.generate import GENERATE
from peftc.cli.merge import MERGE
from peftc.cli.methods import METHODS
from peftc.cli.plan import PLAN
from peftc.cli.show import SHOW
from peftc.cli.sites import SITES
from peftc.diagnostics import debug
from peftc.diagnostics.diagnostic import PeftcError

COMMANDS = (COMPILE, PLAN, CHECK, SITES, METHODS, SHOW, MERGE, EXPORT, GENERATE, BENCH)  # as `peftc --help` lists them


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. A traceback reaches the user only with PEFTC_DEBUG set."""
    given = parser().parse_args(argv)
    with warnings.catch_warnings():
        if not debug.level():
            warnings.simplefilter("ignore")
        try:
            return int(given.run(given) or 0)
        except PeftcError as error:
            complain(error, as_json=given.json)
            return 1
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            if debug.level():
                raise
            told = f"peftc: {type(error).__name__}: {error}\n(set {debug.VARIABLE}=1 for the traceback)"
            print(told, file=sys.stderr)
            return 1


def parser() -> ArgumentParser:
    """Reads a command line: all commands, each with its arguments."""
    made = ArgumentParser(prog="peftc", description="A declarative graph compiler for parameter-efficient fine-tuning.")
    made.add_argument("--version", action="version", version=f"peftc {peftc.__version__}")
    listed = made.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(listed.add_parser(command.name, help=command.help, description=command.help))
    return made
