"""`peftc train`: a spec, a model and data, to an artifact."""

from __future__ import annotations

import re
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftc.cli.common.command import Argument, Command
from peftc.cli.common.inputs import CALIBRATION, DTYPE, JSON, LABELS, MODEL_HELP, TASK, TRUST, model_named, positive
from peftc.cli.common.output import print_json, progress, quieten
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.lazy import Lazy
from peftc.diagnostics.render import visible
from peftc.training import record
from peftc.training.errors import BadSettings

if TYPE_CHECKING:
    from peftc.show import screen
    from peftc.training import curve, options
    from peftc.training import run as running
else:
    screen = Lazy("peftc.show.screen")
    curve, options, running = (Lazy(f"peftc.training.{name}") for name in ("curve", "options", "run"))


def run(given: Namespace) -> int:
    """Trains a model by a spec on data, or goes on with the training that was cut off."""
    quieten()
    settings = _settings(given)
    if lacking := [name for name in ("spec", "model", "data") if not getattr(given, name)]:
        hint = "peftc train SPEC MODEL --data FILE -o DIR, or some of these in a file by --config"
        raise PeftcError(BadSettings(where="peftc train", reason=f"there is no {' and no '.join(lacking)}", hint=hint))
    training = running.Training(
        spec=Path(given.spec), model=model_named(given), data=given.data, folder=Path(given.output), settings=settings,
        held=given.eval_data or (), held_out=given.held_out, columns=dict(given.columns or ()),
        longest=given.max_length, packing=given.packing, tokenizer=given.tokenizer, template=given.chat_template,
        dtype=given.dtype, calibration=given.calibration, write=given.write, fresh=given.fresh,
    )  # fmt: skip
    console = screen.screen(stderr=True)
    with progress(given) as timings:
        trained = running.train(training, timings, console, quiet=given.json)
    if not trained.written:  # by another process of this run
        return 0
    if given.json:
        print_json(trained.to_json() | {"seconds": timings.seconds})
    else:
        _tell(trained)
    return 0


def _settings(given: Namespace) -> dict[str, Any]:
    """transformers' settings: those of the file, and over them those of the command line; the others go to `given`."""
    theirs = options.names()
    read = options.read_config(Path(given.config), _options()) if given.config else {}
    for name in read.keys() - theirs:
        if getattr(given, name) in (None, []):
            setattr(given, name, read[name])
    for name, value in DEFAULTS.items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    return {name: read[name] for name in read.keys() & theirs} | {n: v for n, v in vars(given).items() if n in theirs}


def _options() -> dict[str, Action]:
    """The options that a file may give, by their names there. Code runs and runs are lost by word of mouth alone."""
    parser = ArgumentParser(add_help=False, parents=_parents())
    COMMAND.add_to(parser)
    found = {action.dest: action for action in reversed(parser._actions)}
    return {name: action for name, action in found.items() if name not in NOT_IN_FILES}


def _tell(trained: Any) -> None:
    examples, losses = trained.examples, trained.losses
    if trained.resumed:
        print(f"went on at step {trained.resumed}")
    kept = f"{len(examples.learnt):,} examples"
    lost = [f"{count:,} {what}" for count, what in ((examples.cut, "cut"), (examples.dropped, "dropped")) if count]
    print(", ".join([kept, *lost, *([f"{len(examples.held):,} held out"] if examples.held else [])]))
    if losses:
        print(f"loss {losses[0]:.4f} {curve.line(losses)} {losses[-1]:.4f}, {trained.steps} steps")
    for name, value in trained.metrics.items():
        if name in ("eval_loss", "eval_accuracy"):
            print(f"held-out {name.removeprefix('eval_')} {value:.4f}")
    for what, place in trained.written.items():
        print(f"{what} written to {visible(place)}")


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ArgumentTypeError(f"expects a share, at least 0 and below 1, not {text!r}")
    return share


def _column(text: str) -> tuple[str, str]:
    field, equals, column = text.partition("=")
    if not (field and equals and column):
        raise ArgumentTypeError(f"expects FIELD=COLUMN, such as completion=reply, not {text!r}")
    if re.search(r",\w+=", column):
        raise ArgumentTypeError(f"has spaces between several: {text.replace(',', ' ')}")
    return field, column


def _parents() -> tuple[ArgumentParser, ...]:
    """transformers' own settings. It imports what is to be quiet from the start."""
    quieten()
    return (options.parser(),)


NOT_IN_FILES = {"config", "json", "output", "fresh", "trust_remote_code", "help_all"}
# Where neither the command line nor the file says anything.
DEFAULTS = {"held_out": 0.02, "max_length": 1024, "packing": True, "write": ["artifact"]}

COMMAND = Command(
    "train",
    run,
    (
        JSON,
        Argument("spec", metavar="SPEC", nargs="?", help="a .peft file"),
        Argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP),
        Argument(
            "--data", metavar="FILE", nargs="+",
            help="JSON lines, JSON, CSV or Parquet files, a folder or a hub's data set (ID, ID:CONFIG, ID:SPLIT or "
            "ID:CONFIG:SPLIT), with the columns messages, prompt and completion, instruction (input) and output, text, "
            "text and label, tokens and tags, or image and label",
        ),
        Argument("-o", "--output", metavar="DIR", required=True, help="where checkpoints and what is learned go"),
        Argument("--help-all", action="help", help="this, and all of transformers' settings"),
        Argument("--config", metavar="FILE", help="a YAML file of settings; the command line goes before it"),
        Argument(
            "--columns", metavar="FIELD=COLUMN", nargs="+", type=_column, help="which column is which: completion=reply"
        ),
        Argument("--eval-data", metavar="FILE", nargs="+", help="data that is evaluated and not learnt"),
        Argument(
            "--held-out", metavar="SHARE", type=_share,
            help="of 50 records or more, the share that is held out where there is no --eval-data; 0.02 by default",
        ),
        Argument("--max-length", metavar="TOKENS", type=positive, help="the longest example; 1024 by default"),
        Argument(
            "--no-packing", dest="packing", action="store_false", default=None,
            help="pad the texts of a batch; by default they stand in a row without padding",
        ),
        Argument("--tokenizer", metavar="SOURCE", help="a folder or hub id with the tokenizer or image processor"),
        Argument("--chat-template", metavar="FILE", help="a Jinja chat template in place of the tokenizer's"),
        Argument(
            "--write", nargs="+", choices=record.WRITTEN,
            help="what is written at the end: peftc's artifact (the default), HF PEFT's folder, the merged model",
        ),
        Argument("--fresh", action="store_true", help="begin anew in a folder that holds another run"),
        CALIBRATION, TASK, LABELS, DTYPE, TRUST,
    ),
    _parents,
    "All settings of transformers' TrainingArguments are options, too, such as --learning_rate 1e-4, "
    "--num_train_epochs 3 and --per_device_train_batch_size 4; --help-all lists them.",
)  # fmt: skip
