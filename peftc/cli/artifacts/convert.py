"""`peftc convert`: what a folder of HF PEFT, or a file of other tools, says, as a spec."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from peftc.cli.common.command import Argument, Command
from peftc.cli.common.inputs import MODEL_HELP, TRUST
from peftc.cli.common.output import quieten
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.lazy import Lazy
from peftc.diagnostics.render import visible

if TYPE_CHECKING:
    from peftc import api
    from peftc.files import errors, whole
    from peftc.files.adapters import convert, kohya
    from peftc.files.hf_peft import folder
else:
    api = Lazy("peftc.api")
    errors, whole = Lazy("peftc.files.errors"), Lazy("peftc.files.whole")
    convert, kohya = Lazy("peftc.files.adapters.convert"), Lazy("peftc.files.adapters.kohya")
    folder = Lazy("peftc.files.hf_peft.folder")


def run(given: Namespace) -> None:
    """The spec that an adapter of HF PEFT, kohya or LyCORIS means."""
    quieten()
    place = Path(given.adapter)
    model = None
    if given.model is not None:
        model, _ = api.as_model(given.model, trust_remote_code=given.trust_remote_code, meta=True)
    text = convert.converted(place, kohya.read(place, model) if place.is_file() else folder.read_files(place))
    if given.output is None:
        print(text, end="")
        return
    try:
        whole.write_whole(given.output, text)
    except OSError as error:
        reason = error.strerror or str(error)
        raise PeftcError(errors.CannotWrite(folder=given.output, reason=reason)) from None
    print(f"written to {visible(given.output)}")


COMMAND = Command(
    "convert",
    run,
    (
        Argument("adapter", metavar="ADAPTER", help="a folder of HF PEFT, or a .safetensors file of kohya or LyCORIS"),
        Argument("-o", "--output", metavar="FILE", help="a .peft file, instead of standard output"),
        Argument("--model", metavar="MODEL", help=f"whose names a file means, that has no dots in them: {MODEL_HELP}"),
        TRUST,
    ),
)
