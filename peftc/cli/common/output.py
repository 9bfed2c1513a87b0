"""What commands write: diagnostics, data, files, and the stage that runs."""

from __future__ import annotations

import json
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peftc.diagnostics import debug
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.lazy import Lazy
from peftc.diagnostics.render import render_all
from peftc.diagnostics.timings import Timings

if TYPE_CHECKING:
    from rich import status
    from transformers.utils import logging as transformers_logging

    from peftc.show import screen
else:
    screen = Lazy("peftc.show.screen")
    status = Lazy("rich.status")
    transformers_logging = Lazy("transformers.utils.logging")

NOISY = ("bitsandbytes", "huggingface_hub", "httpx", "kernels", "torch")  # loggers of what several commands run


def complain(error: PeftcError, *, as_json: bool) -> None:
    """All diagnostics of an error: as data on standard output, or as text on standard error."""
    if as_json:
        print_json({"errors": [diagnostic.to_json() for diagnostic in error.diagnostics]})
        return
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    text = render_all(error.diagnostics, colour=colour, columns=_columns())
    count = len(error.diagnostics)
    print(text + (f"\n\n{count} errors" if count > 1 else ""), file=sys.stderr)


def _columns() -> int | None:
    """How wide the terminal is that standard error is; None where it is none, and lines are cut by nobody."""
    if not sys.stderr.isatty():
        return None
    told = os.environ.get("COLUMNS", "")
    return int(told) if told.isdecimal() and int(told) else os.get_terminal_size(sys.stderr.fileno()).columns or None


@contextmanager
def progress(given: Namespace) -> Iterator[Timings]:
    """Timings whose stages show as they run: a spinner on a terminal, nothing elsewhere."""
    console = screen.screen(stderr=True)
    if not console.is_terminal or given.json:
        yield Timings()
        return
    with status.Status("starting", console=console) as spinner:
        yield Timings(progress=lambda stage: spinner.update(f"{stage} …"))


def quieten() -> None:
    """The progress bar of weights being read shows only where somebody watches it, and notices only where all do."""
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    if not debug.level():
        transformers_logging.set_verbosity_error()
        for library in NOISY:
            logging.getLogger(library).setLevel(logging.ERROR)


def print_json(data: Any) -> None:
    """`data`, for `--json`."""
    print(json.dumps(data, indent=2))
