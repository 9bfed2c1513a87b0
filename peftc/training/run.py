"""A training from its data to its artifact, in the order in which things can go wrong."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch import nn
from transformers import PretrainedConfig, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import peftc
from peftc.capture.checkpoints.differences import NO_DIFFERENCES
from peftc.capture.checkpoints.naming import Reference
from peftc.capture.checkpoints.references import read_model
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.timings import Timings
from peftc.driver.calibration import read_batches
from peftc.driver.loading import knowing
from peftc.files.merge import save_merged
from peftc.spec.check import intend
from peftc.training import curve, record
from peftc.training.collating import Examples, encoded, tokenizer_of
from peftc.training.columns import Data, gathered
from peftc.training.errors import BadSettings, NothingToLearn, SeveralTasks, WrongModel
from peftc.training.options import WHERE, arguments
from peftc.training.progress import Told, peak_memory
from peftc.training.records import read
from peftc.training.trainer import SpecTrainer, accuracy

FEW = 50  # records of which none is held out


@dataclass(frozen=True)
class Training:
    """What a run is given.

    `settings` are transformers' TrainingArguments; `columns` says of a field of the data which column it is; `held_out`
    is the share of the records that is evaluated and not learnt, where there are no `held` files; `longest` counts
    tokens; `calibration` is a file of batches for methods that start from data; `write` are of `record.WRITTEN`.
    """

    spec: Path
    model: Reference
    data: Sequence[str]
    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    held: Sequence[str] = ()
    held_out: float = 0.02
    columns: Mapping[str, str] = field(default_factory=dict)
    longest: int = 1024
    packing: bool = True
    tokenizer: str | None = None
    template: str | None = None
    dtype: str | None = None
    calibration: str | None = None
    write: Sequence[str] = ("artifact",)
    fresh: bool = False


@dataclass(frozen=True)
class Trained:
    """What became of it."""

    compiled: peftc.CompiledModule
    history: Sequence[Mapping[str, Any]]
    examples: Examples
    steps: int
    resumed: int  # the step at which it went on, 0 for a run from its beginning
    metrics: Mapping[str, float]
    written: Mapping[str, str]

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.history if "loss" in entry]

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": self.steps, "resumed_at": self.resumed, "losses": self.losses, "metrics": dict(self.metrics),
            "examples": len(self.examples.learnt), "held_out": len(self.examples.held), "cut": self.examples.cut,
            "dropped": self.examples.dropped, "peak_memory": peak_memory(), "written": dict(self.written),
        }  # fmt: skip


def train(given: Training, timings: Timings, console: Console, *, quiet: bool = False) -> Trained:
    """Trains, or goes on with the training that `given.folder` holds.

    Raises:
        PeftcError: all that is wrong with the spec, then with the settings, then with the data, before the model is
            read; `wrong-model`, `no-tokenizer`, `other-run`, and what `peftc.compile` raises.
    """
    with timings.stage("check"):
        if tasks := tuple(intend(given.spec).tasks):
            raise PeftcError(SeveralTasks(spec=str(given.spec), tasks=tasks))
        args = arguments(given.folder, {**_machine(), **given.settings})
    with timings.stage("read data"):
        data, held = _data(given, args.seed)
    checkpoint = _claimed(given, args)
    set_seed(args.seed)  # adapters start random
    compiled = _compiled(given, data, timings)
    with timings.stage("tokens"):
        examples = encoded(
            data, held, compiled, source=_reader(given, compiled),
            longest=given.longest, packing=given.packing, template=given.template, trusted=given.model.trusted,
        )  # fmt: skip
    _evaluated(args, given.settings, examples)
    if data.shape.learns == "images":
        args.include_num_input_tokens_seen = "no"  # it would count numbers of pixels
    labelled = data.shape.learns in ("labels", "images") and not data.several
    args.prediction_loss_only = not labelled
    trainer = SpecTrainer(
        model=compiled, args=args, train_dataset=examples.learnt, eval_dataset=examples.held or None,
        data_collator=examples.collate, callbacks=[compiled.callback(), Told(console, quiet=quiet)],
        compute_metrics=accuracy if labelled else None,
    )  # fmt: skip
    trainer.silence()
    resumed = 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])
    trainer.train(resume_from_checkpoint=checkpoint)
    history = trainer.state.log_history
    last = [] if args.load_best_model_at_end else history[-2:]  # an evaluation of the weights as they are
    now = next((entry for entry in last if "eval_loss" in entry and entry["step"] == trainer.state.global_step), None)
    metrics = (now or trainer.evaluate()) if examples.held else {}
    written = _written(given, compiled, history) if trainer.is_world_process_zero() else {}
    PartialState().wait_for_everyone()
    return Trained(compiled, history, examples, trainer.state.global_step, resumed, metrics, written)


def _machine() -> dict[str, Any]:
    """Settings that follow from where it runs: without being told, transformers takes bf16 for a GPU's."""
    return {"dataloader_pin_memory": torch.cuda.is_available(), "use_cpu": not torch.accelerator.is_available()}


def _data(given: Training, seed: int) -> tuple[Data, Data | None]:
    """What is learnt, and what is held out."""
    task = given.model.task
    data = gathered([(name, read(name)) for name in given.data], given.columns, task)
    if task and data.shape.learns in ("labels", "tags", "images") and task != data.shape.task:
        reason = f"{data.shape} is for {data.shape.task}"
        raise PeftcError(WrongModel(model=f"a model for {task}", data=data.source, reason=reason))
    if given.held:
        held = gathered([(name, read(name)) for name in given.held], given.columns, task)
        if held.shape != data.shape:
            reason = f"{held.source} is {held.shape}, and {data.source} is {data.shape}"
            raise PeftcError(NothingToLearn(reason=reason))
        if not {*held.classes} <= {*data.classes}:
            reason = f"{held.source} has the classes {', '.join(sorted({*held.classes} - {*data.classes}))} alone"
            raise PeftcError(NothingToLearn(reason=reason))
        return data, replace(held, classes=data.classes, several=data.several)
    count = round(len(data.records) * given.held_out)
    if len(data.records) < FEW or not count:
        return data, None
    places = {*random.Random(seed).sample(range(len(data.records)), count)}
    parts = [[r for i, r in enumerate(data.records) if (i in places) == held] for held in (False, True)]
    learnt, kept = (replace(data, records=tuple(part)) for part in parts)
    return learnt, kept


def _claimed(given: Training, args: TrainingArguments) -> str | None:
    """The checkpoint to go on from. One process of several looks at the folder first."""
    spec = given.spec.read_text(encoding="utf-8")
    names = ("held", "held_out", "columns", "longest", "packing", "tokenizer", "template", "calibration", "dtype")
    own = {name: getattr(given, name) for name in names} | {"task": given.model.task, "labels": given.model.labels}
    own["processes"] = PartialState().num_processes * max(args.n_gpu, 1)  # each learns a batch of its own in a step
    files = (*given.data, *given.held, *filter(None, (given.template, given.calibration)))
    run = record.described(spec, given.model.text, files, {**own, **given.settings})
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            record.claim(given.folder, run, fresh=given.fresh)
    found: str | None = get_last_checkpoint(str(args.output_dir))
    return found


def _compiled(given: Training, data: Data, timings: Timings) -> peftc.CompiledModule:
    source: nn.Module | Reference = given.model
    example, differences = None, NO_DIFFERENCES
    batches = read_batches(Path(given.calibration)) if given.calibration else None
    if data.classes:
        with timings.stage("load"):
            loaded = read_model(_for_classes(given.model, data), dtype=given.dtype)
            source, example, differences = loaded.model, loaded.example, loaded.differences
            _named(source, data)
            _padded(source, given, data)
    compiled = peftc.compile(
        source, given.spec, example=example, calibration=batches, dtype=None if data.classes else given.dtype,
        timings=timings,
    )  # fmt: skip
    knowing(given.model.text, compiled.plan, differences)
    if not compiled.plan.captured.has_loss:
        task = data.shape.task
        raise PeftcError(
            WrongModel(model=given.model.text, data=data.source, reason=f"it computes no loss; try --task {task}")
        )
    return compiled


def _reader(given: Training, model: nn.Module) -> str:
    """Where the tokenizer or image processor is."""
    return given.tokenizer or getattr(model, "name_or_path", "") or given.model.text


def _padded(model: nn.Module, given: Training, data: Data) -> None:
    """Models that classify a text by its last token have to know what is none."""
    config = getattr(model, "config", None)
    if data.shape.learns != "labels" or not isinstance(config, PretrainedConfig):
        return
    if (text := config.get_text_config()).pad_token_id is None:
        text.pad_token_id = tokenizer_of(_reader(given, model), trusted=given.model.trusted).pad_token_id


def _for_classes(model: Reference, data: Data) -> Reference:
    if model.kind in ("factory", "gguf"):
        return model
    return replace(model, task=model.task or data.shape.task, labels=model.labels or len(data.classes))


def _named(model: nn.Module, data: Data) -> None:
    """The model's classes are called as the data calls them."""
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return
    known = config.num_labels or 0
    if known < len(data.classes):
        reason = f"it tells {known} classes apart, and the data has {len(data.classes)}"
        raise PeftcError(WrongModel(model=type(model).__name__, data=data.source, reason=reason))
    if known == len(data.classes):
        config.id2label = dict(enumerate(data.classes))
        config.label2id = {name: place for place, name in enumerate(data.classes)}
    if data.shape.learns in ("labels", "images"):
        config.problem_type = "multi_label_classification" if data.several else "single_label_classification"


def _evaluated(args: TrainingArguments, asked: Mapping[str, Any], examples: Examples) -> None:
    """What is held out is evaluated after each epoch, where nothing else is said."""
    if examples.held and "eval_strategy" not in asked:
        args.eval_strategy = "epoch"
    if not examples.held and args.eval_strategy != "no":
        reason = f"eval_strategy is {args.eval_strategy}, and nothing is held out"
        raise PeftcError(BadSettings(where=WHERE, reason=reason, hint="give --eval-data, or a larger --held-out"))


def _written(given: Training, compiled: peftc.CompiledModule, history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Writes what was learned, its losses and their curve; what is where."""
    written = {}
    for what in given.write:
        place = given.folder / what
        if what == "artifact":
            compiled.save(place)
        elif what == "peft":
            compiled.save_pretrained(place)
        else:
            merged = compiled.merge()
            if place.is_dir():  # of this run, when it ended before
                shutil.rmtree(place)
            save_merged(merged, place)
        written[what] = str(place)
    curve.write(history, given.folder / record.HISTORY)
    if curve.picture(history, given.folder / record.CURVE):
        written["curve"] = str(given.folder / record.CURVE)
    return written
