"""Modules that are imported when something of them is first used: a first answer does not wait for the last stage."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any


class Lazy(ModuleType):
    """A module that is imported when something of it is first asked for.

    Type checkers, and whoever reads imports, see an ordinary import:

        if TYPE_CHECKING:
            from peftc.show import tables
        else:
            tables = Lazy("peftc.show.tables")
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)
