"""What a command is: its name, its arguments, what it does, and the stages that are imported when it does it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any


class Lazy(ModuleType):
    """A module that is imported when something of it is first asked for.

    A usage message does not wait for torch. Type checkers, and whoever reads imports, see an ordinary import:

        if TYPE_CHECKING:
            from peftc.show import tables
        else:
            tables = Lazy("peftc.show.tables")
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)


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

    @property
    def help(self) -> str:
        """The docstring of `run`."""
        return (self.run.__doc__ or "").strip()

    def add_to(self, parser: ArgumentParser) -> None:
        """Has `parser` read this command's arguments, and say by whom they are run."""
        parser.set_defaults(run=self.run)
        for argument in self.arguments:
            parser.add_argument(*argument.names, **argument.options)
