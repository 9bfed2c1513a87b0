"""`peftc fmt`: specs in one layout."""

from __future__ import annotations

import difflib
import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from peftc.cli.common.command import Argument, Command
from peftc.cli.common.inputs import JSON
from peftc.cli.common.output import print_json
from peftc.diagnostics.diagnostic import Diagnostic, PeftcError
from peftc.diagnostics.lazy import Lazy
from peftc.diagnostics.render import visible
from peftc.diagnostics.source import Source
from peftc.files.whole import write_whole

if TYPE_CHECKING:
    import peftc.language.parse as reading  # whose name in the package is a function's
    from peftc.cli.editor import layout
else:
    layout, reading = Lazy("peftc.cli.editor.layout"), Lazy("peftc.language.parse")

STANDARD_INPUT = "-"


def run(given: Namespace) -> int:
    """Lays specs out: white space alone changes, comments stay. Files with mistakes stay as they are."""
    problems: list[Diagnostic] = []
    changed: list[str] = []
    same: list[str] = []
    for name in given.files:
        try:
            source = _source(name)
            text = layout.laid_out(source)
        except PeftcError as error:
            problems += error.diagnostics
            continue
        (same if text == source.text else changed).append(source.name)
        if given.diff and not given.json:
            print(_difference(source, text), end="")
        elif name == STANDARD_INPUT and not (given.check or given.json):
            print(text, end="")
        elif text != source.text and name != STANDARD_INPUT and not (given.check or given.diff):
            write_whole(name, text)
        if text != source.text and given.check and not given.json:
            print(f"{visible(source.name)}: would be laid out otherwise", file=sys.stderr)
    if given.json and not problems:
        print_json({"changed": changed, "unchanged": same})
    if problems:
        raise PeftcError(*problems)
    return int(bool(given.check and changed))


def _source(name: str) -> Source:
    return reading.decoded("<stdin>", sys.stdin.buffer.read()) if name == STANDARD_INPUT else reading.source_of(name)


def _difference(source: Source, text: str) -> str:
    before, after = (each.splitlines(keepends=True) for each in (source.text, text))
    lines = difflib.unified_diff(before, after, source.name, source.name)
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


COMMAND = Command(
    "fmt",
    run,
    (
        Argument("files", nargs="+", metavar="FILE", help=".peft files; - for standard input, to standard output"),
        JSON,
        Argument("--check", action="store_true", help="write nothing; the exit status is 1 if a file would change"),
        Argument("--diff", action="store_true", help="write nothing; print what would change"),
    ),
)
