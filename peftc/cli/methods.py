"""`peftc methods`: what a spec can apply, and what it can quantise with."""

from __future__ import annotations

import re
from argparse import Namespace
from typing import TYPE_CHECKING

from peftc.cli.common.command import Argument, Command
from peftc.cli.common.inputs import JSON
from peftc.cli.common.output import print_json
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.lazy import Lazy

if TYPE_CHECKING:
    from peftc.language import words
    from peftc.protocol import params
    from peftc.show import registry, screen
    from peftc.spec import calls, errors
else:
    words = Lazy("peftc.language.words")
    params, calls, errors = Lazy("peftc.protocol.params"), Lazy("peftc.spec.calls"), Lazy("peftc.spec.errors")
    registry, screen = Lazy("peftc.show.registry"), Lazy("peftc.show.screen")


def run(given: Namespace) -> None:
    """The registry of methods and storages, or one of it."""
    if given.name is not None:
        _one(given.name, as_json=given.json)
    elif given.json:
        print_json(registry.described())
    else:
        methods = registry.methods_table(papers=screen.standard().width >= 100)
        screen.print_all(methods, registry.storages_table(), registry.parameterisations_table())


def _one(asked: str, *, as_json: bool) -> None:
    """What is called so here, or what is meant by a name that others have for it."""
    brought = words.meant(asked)
    named = [asked, *re.findall(r"\w+", brought.here)] if brought else [asked]
    names = [name for kind in calls.KINDS for name in params.registered(kind)]
    found = next((name for name in named if name in names), None)
    if found is None and brought is None:
        raise PeftcError(errors.UnknownMethod(name=asked, known=tuple(names)))
    if as_json:
        print_json([item for item in registry.described() if item["name"] == found])
        return
    if brought and found != asked:
        screen.print_all(f"{asked} is written: {brought.here}" + (f" ({brought.why})" if brought.why else ""))
    if found:
        screen.print_all(registry.page(found))


COMMAND = Command(
    "methods",
    run,
    (
        JSON,
        Argument(
            "name",
            nargs="?",
            metavar="NAME",
            help="one of them, also by what others call it",
        ),
    ),
)
