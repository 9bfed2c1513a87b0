"""What several commands are given: their common arguments, and the specs, models and batches that these name."""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc.capture.checkpoints.errors import PRECISIONS
from peftc.cli.common.command import Argument, Lazy
from peftc.diagnostics import debug
from peftc.diagnostics.timings import Timings

if TYPE_CHECKING:
    from torch import nn
    from transformers.utils import logging as transformers_logging

    from peftc.capture.checkpoints import references
    from peftc.driver import calibration
    from peftc.spec import check
    from peftc.spec.resolve import Intentions
else:
    transformers_logging = Lazy("transformers.utils.logging")
    references = Lazy("peftc.capture.checkpoints.references")
    calibration = Lazy("peftc.driver.calibration")
    check = Lazy("peftc.spec.check")

MODEL_HELP = (
    "a Hugging Face folder or id, a .gguf file, a config.json, or path/to/file.py:factory, which runs that file"
)

SPEC = Argument("spec", metavar="SPEC", help="a .peft file")
MODEL = Argument("model", metavar="MODEL", help=MODEL_HELP)
JSON = Argument("--json", action="store_true", help="print data instead of tables")
TRUST = Argument(
    "--trust-remote-code",
    action="store_true",
    help="let Python code run that the model's folder or hub id comes with; without it, such a model is refused",
)
RANDOM_WEIGHTS = Argument("--random-weights", action="store_true", help="initialise instead of reading weights")
DTYPE = Argument("--dtype", choices=PRECISIONS, help="precision of the base model")
CALIBRATION = Argument(
    "--calibration",
    metavar="FILE",
    help="a .safetensors file with one tensor [N, ...] for each input of the model, labels included, for "
    "methods that start from data; it is run in batches of 8",
)


def positive(text: str) -> int:
    """A whole number, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expects a whole number, at least 1, not {text!r}")
    return int(text)


def amount(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ArgumentTypeError(f"expects a number above 0, not {text!r}")
    return number


def checked_spec(given: Namespace, timings: Timings) -> Intentions:
    """What the spec wants. Raises `PeftcError` with everything that is wrong and can be known without a model."""
    with timings.stage("check"):
        return check.intend(Path(given.spec))


def calibration_batches(given: Namespace) -> list[dict[str, Any]] | None:
    """The batches of `--calibration`; None without."""
    return calibration.read_batches(Path(given.calibration)) if given.calibration else None


def model_to_compile(given: Namespace, timings: Timings, dtype: str | None) -> tuple[nn.Module | str, Any]:
    """The reference itself, which `peftc.compile` reads in its own way, or a model of random weights; its example."""
    quieten()
    if not given.random_weights:
        return given.model, None
    with timings.stage("load"):
        loaded = load_model(given, dtype=dtype)
    return loaded.model, loaded.example


def load_model(given: Namespace, *, dtype: str | None, meta: bool = False) -> references.Loaded:
    """The model, its example, and how its checkpoint differs from it."""
    quieten()
    reference = references.parse_reference(given.model, trust_remote_code=given.trust_remote_code)
    return references.read_model(reference, meta=meta, random_weights=given.random_weights, dtype=dtype)


def quieten() -> None:
    """The progress bar of weights being read shows only where somebody watches it, and libraries keep to errors."""
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    if not debug.level():
        transformers_logging.set_verbosity_error()
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
