"""What commands write: diagnostics, data, files, and the stage that runs."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc.cli.common.command import Lazy
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.render import render
from peftc.diagnostics.timings import Timings

if TYPE_CHECKING:
    from rich import console, status
else:
    console = Lazy("rich.console")
    status = Lazy("rich.status")


def complain(error: PeftcError, *, as_json: bool) -> None:
    """All diagnostics of an error: as data on standard output, or as text on standard error."""
    if as_json:
        print_json({"errors": [diagnostic.to_json() for diagnostic in error.diagnostics]})
        return
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    text = "\n\n".join(render(diagnostic, colour=colour) for diagnostic in error.diagnostics)
    count = len(error.diagnostics)
    print(text + (f"\n\n{count} errors" if count > 1 else ""), file=sys.stderr)


@contextmanager
def progress(given: Namespace) -> Iterator[Timings]:
    """Timings whose stages show as they run: a spinner on a terminal, nothing elsewhere."""
    screen = console.Console(stderr=True)
    if not screen.is_terminal or given.json:
        yield Timings()
        return
    with status.Status("starting", console=screen) as spinner:
        yield Timings(progress=lambda stage: spinner.update(f"{stage} …"))


def print_json(data: Any) -> None:
    """`data`, for `--json`."""
    print(json.dumps(data, indent=2))


def write_text(path: str, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
