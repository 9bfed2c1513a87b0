"""`peftc lsp`: what editors ask of a language server, over standard input and output."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from peftc.cli.common.command import Argument, Command
from peftc.cli.common.inputs import LABELS, MODEL_HELP, TASK, TRUST
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.extras import NeedsExtra
from peftc.diagnostics.lazy import Lazy

if TYPE_CHECKING:
    from peftc.cli.editor import model, server
else:
    model, server = Lazy("peftc.cli.editor.model"), Lazy("peftc.cli.editor.server")


def run(given: Namespace) -> None:
    """A language server for editors: diagnostics, completion, hover, definitions, layout."""
    if find_spec("pygls") is None:
        raise PeftcError(NeedsExtra(command="peftc lsp", package="pygls", extra="lsp"))
    asked = model.Asked(given.model, given.task, given.labels, given.trust_remote_code) if given.model else None
    # What else would read or write here, a model's own code too, would be taken for what the editor and the server say.
    asking, telling = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    server.Editor(asked).serve(asking, telling)


COMMAND = Command(
    "lsp",
    run,
    (
        Argument("--model", metavar="MODEL", help=f"which specs are planned for, {MODEL_HELP}"),
        TASK,
        LABELS,
        TRUST,
    ),
)
