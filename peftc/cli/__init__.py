"""The `peftc` command, one file a command. Exit status: 0 done, 1 a diagnostic, 2 wrong usage."""

from __future__ import annotations

import os
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import import_module

import peftc
from peftc.cli.common.command import Command
from peftc.cli.common.output import complain
from peftc.diagnostics import debug
from peftc.diagnostics.diagnostic import PeftcError

COMMANDS = (  # as `peftc --help` lists them, each with a file of that name
    "compile", "train", "plan", "check", "explain", "sites", "methods", "show", "merge", "combine", "convert", "export",
    "generate", "bench", "fmt", "lsp", "schema", "completion",
)  # fmt: skip
HELP = ("-h", "--help")  # what takes long to be told is in the --help-all of the commands that have such
FOLDERS = {  # of the commands whose files have one of their own
    "fmt": "editor", "lsp": "editor", "schema": "schemas",
    "merge": "artifacts", "combine": "artifacts", "convert": "artifacts", "export": "artifacts",
    "generate": "artifacts",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. A traceback reaches the user only with PEFTC_DEBUG set."""
    arguments = sys.argv[1:] if argv is None else [*argv]
    given = parser(arguments).parse_args(arguments)
    with warnings.catch_warnings():
        if not debug.level():
            warnings.simplefilter("ignore")
        try:
            return int(given.run(given) or 0)
        except PeftcError as error:
            complain(error, as_json=getattr(given, "json", False))
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


def command(name: str) -> Command:
    """One command, out of its file."""
    found: Command = import_module(".".join(filter(None, ("peftc.cli", FOLDERS.get(name), name)))).COMMAND
    return found


def parser(arguments: Sequence[str] = ()) -> ArgumentParser:
    """Reads a command line: all commands, each with its arguments.

    Of `arguments` that begin with the name of a command, that one alone: the files of the others are not imported.
    """
    made = ArgumentParser(prog="peftc", description="A declarative graph compiler for parameter-efficient fine-tuning.")
    made.add_argument("--version", action="version", version=f"peftc {peftc.__version__}")
    listed = made.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name in COMMANDS if not {*arguments[:1]} & {*COMMANDS} else arguments[:1]:
        one = command(name)
        parents = one.parents() if [name] == [*arguments[:1]] and not {*HELP} & {*arguments} else ()
        one.add_to(listed.add_parser(one.name, help=one.help, description=one.help, epilog=one.epilog, parents=parents))
    return made
