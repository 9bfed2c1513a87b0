"""`peftc completion`: the words of the command line, for a shell to complete."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _SubParsersAction
from typing import TYPE_CHECKING

from peftc.cli import parser
from peftc.cli.common.command import Argument, Command
from peftc.diagnostics.lazy import Lazy

if TYPE_CHECKING:
    import shtab

    from peftc.protocol import method, storage
else:
    shtab = Lazy("shtab")
    method, storage = Lazy("peftc.protocol.method"), Lazy("peftc.protocol.storage")

SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")
ON_DISK = ("SPEC", "MODEL", "DIR", "FILE", "OUT")  # metavars of files and folders


def run(given: Namespace) -> None:
    """Prints a script by which a shell completes what follows `peftc`."""
    whole = parser()
    for action in whole._actions:
        if isinstance(action, _SubParsersAction):
            for each in action.choices.values():
                _tell(each)
    print(shtab.complete(whole, shell=given.shell))


def _tell(command: ArgumentParser) -> None:
    """What the arguments of one command may be, where argparse does not know: files, and names in the registries."""
    for action in command._actions:
        if action.metavar in ON_DISK:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif command.prog.endswith(" methods") and action.dest == "name":
            action.choices = (*method.methods(), *storage.storages())


COMMAND = Command(
    "completion",
    run,
    (Argument("shell", choices=SHELLS, help='for bash: eval "$(peftc completion bash)" in .bashrc'),),
)
