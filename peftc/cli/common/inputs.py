"""What several commands are given: their common arguments, and the specs, models and batches that these name."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc.capture.checkpoints.errors import PRECISIONS, BadReference
from peftc.capture.checkpoints.naming import TASKS, Reference, answering, parse_reference
from peftc.cli.common.command import Argument
from peftc.cli.common.output import quieten
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.lazy import Lazy
from peftc.diagnostics.timings import Timings

if TYPE_CHECKING:
    from torch import nn

    from peftc.capture.checkpoints import references
    from peftc.driver import calibration
    from peftc.spec import check
    from peftc.spec.resolve import Intentions
else:
    references = Lazy("peftc.capture.checkpoints.references")
    calibration = Lazy("peftc.driver.calibration")
    check = Lazy("peftc.spec.check")


def positive(text: str) -> int:
    """A whole number, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expects a whole number, at least 1, not {text!r}")
    return int(text)


MODEL_HELP = (
    "a Hugging Face folder or id, a .gguf file, a config.json, or path/to/file.py:factory, which runs that file"
)

ARTIFACT_HELP = "what 'peftc compile -o' or save() wrote, or 'peftc train -o DIR' as DIR/artifact"
SPEC = Argument("spec", metavar="SPEC", help="a .peft file")
MODEL = Argument("model", metavar="MODEL", help=MODEL_HELP)
JSON = Argument("--json", action="store_true", help="print data instead of tables")
TRUST = Argument(
    "--trust-remote-code",
    action="store_true",
    help="let Python code run that the model's folder or hub id comes with; without it, such a model is refused",
)
RANDOM_WEIGHTS = Argument("--random-weights", action="store_true", help="initialise instead of reading weights")
PEFT_TASKS = {  # LoraConfig's `task_type`
    "CAUSAL_LM": "text-generation", "SEQ_2_SEQ_LM": "text2text-generation", "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification", "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}  # fmt: skip


def _task(text: str) -> str:
    """A task's name as it is; of those that HF PEFT has for it, what it is called here."""
    if here := PEFT_TASKS.get(text.upper()):
        raise ArgumentTypeError(f"{text} is {here} here")
    return text


TASK = Argument(
    "--task", metavar="TASK", type=_task, choices=TASKS,
    help=f"which head the model gets, by default what its config says: {', '.join(TASKS)}",
)  # fmt: skip
LABELS = Argument("--labels", type=positive, metavar="N", help="classes of a head that classifies")
DTYPE = Argument("--dtype", choices=PRECISIONS, help="precision of the base model")
CALIBRATION = Argument(
    "--calibration",
    metavar="FILE",
    help="a .safetensors file with one tensor [N, ...] for each input of the model, labels included, for "
    "methods that start from data; it is run in batches of 8",
)


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
        intentions = check.intend(Path(given.spec))
    timings.progress("import")  # of torch and transformers, which takes most of the time up to the next stage
    return intentions


def model_named(given: Namespace) -> Reference:
    """What names the model. Raises `PeftcError` where there is none of that name, before torch is imported for it."""
    task = given.task if given.task in TASKS else ""
    reference = replace(
        parse_reference(given.model, trust_remote_code=given.trust_remote_code), task=task, labels=given.labels
    )
    if (task or given.labels is not None) and reference.kind in ("factory", "gguf"):
        reason = f"--task and --labels are for a model that transformers builds, not for a {reference.kind}"
        raise PeftcError(BadReference(reference=reference.text, reason=reason))
    answering(reference)
    quieten()
    return reference


def calibration_batches(given: Namespace) -> list[dict[str, Any]] | None:
    """The batches of `--calibration`; None without."""
    return calibration.read_batches(Path(given.calibration)) if given.calibration else None


def model_to_compile(given: Namespace, timings: Timings, dtype: str | None) -> tuple[nn.Module | Reference, Any]:
    """The reference itself, which `peftc.compile` reads in its own way, or a model of random weights; its example."""
    if not given.random_weights:
        return model_named(given), None
    with timings.stage("load"):
        loaded = load_model(given, dtype=dtype)
    return loaded.model, loaded.example


def load_model(given: Namespace, *, dtype: str | None, meta: bool = False) -> references.Loaded:
    """The model, its example, and how its checkpoint differs from it."""
    return references.read_model(model_named(given), meta=meta, random_weights=given.random_weights, dtype=dtype)
