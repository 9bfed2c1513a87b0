"""What a command is: its name, its arguments, and what it does."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


class Argument:
    """One argument, kept as `add_argument` takes it until there is a parser: several commands may have it."""

    def __init__(self, *names: str, **options: Any) -> None:
        self.names = names
        self.options = options


@dataclass(frozen=True)
class Command:
    """One command of `peftc`."""

    name: str
    run: Callable[[Namespace], int | None]  # returns the exit status; None is 0
    arguments: tuple[Argument, ...]
    parents: Callable[[], Sequence[ArgumentParser]] = tuple  # of further arguments, which take time to be told
    epilog: str | None = None  # what `--help` ends with

    @property
    def help(self) -> str:
        """The docstring of `run`."""
        return (self.run.__doc__ or "").strip()

    def add_to(self, parser: ArgumentParser) -> None:
        """Has `parser` read this command's arguments, and say by whom they are run."""
        parser.set_defaults(run=self.run)
        for argument in self.arguments:
            parser.add_argument(*argument.names, **argument.options)
