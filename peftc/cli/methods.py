"""`peftc methods`: what a spec can apply, and what it can quantise with."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from peftc.cli.common.command import Argument, Command, Lazy
from peftc.cli.common.inputs import JSON
from peftc.cli.common.output import print_json
from peftc.diagnostics.diagnostic import PeftcError
from peftc.spec.errors import UnknownMethod

if TYPE_CHECKING:
    from peftc.protocol import method, storage
    from peftc.show import tables
else:
    method = Lazy("peftc.protocol.method")
    storage = Lazy("peftc.protocol.storage")
    tables = Lazy("peftc.show.tables")


def run(given: Namespace) -> None:
    """The registry of methods and storages, or one of it."""
    methods, storages = method.methods(), storage.storages()
    if given.name and given.name not in methods and given.name not in storages:
        raise PeftcError(UnknownMethod(name=given.name, known=tuple(methods)))
    if given.json:
        everything = [*tables.described_methods(), *tables.described_storages()]
        print_json([item for item in everything if given.name in (None, item["name"])])
    elif given.name in methods:
        tables.print_all(tables.method_page(methods[given.name]))
    elif given.name:
        tables.print_all(tables.storage_page(storages[given.name]))
    else:
        tables.print_all(tables.methods_table(), tables.storages_table())


METHODS = Command(
    "methods",
    run,
    (JSON, Argument("name", nargs="?", metavar="NAME", help="one method or storage, with its parameters")),
)
