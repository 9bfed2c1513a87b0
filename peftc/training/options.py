"""Every setting of transformers' TrainingArguments, as an option and as a line of a YAML file."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from transformers import HfArgumentParser, TrainingArguments

from peftc.diagnostics.diagnostic import Diagnostic, PeftcError
from peftc.training.errors import BadSettings

WHERE = "the settings of the training"
# What this command decides itself.
OWN = {"output_dir", "resume_from_checkpoint", "do_train", "do_eval", "do_predict", "use_liger_kernel", "local_rank"}
# Where this command begins otherwise than transformers does. Adapters take a larger rate than whole models: QLoRA's
# (Dettmers et al. 2023, arXiv:2305.14314). And a run is to be seen and gone on with.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "logging_steps": 10,
    "logging_first_step": True,
    "save_steps": 100,
    "save_total_limit": 2,
    "include_num_input_tokens_seen": "non_padding",
    "report_to": "none",
    "ddp_find_unused_parameters": False,  # all that learns is in the graph
}
# What this command does not do, and why.
REFUSED = {
    "label_smoothing_factor": "the loss is the model's own, which is computed in its graph",
    "neftune_noise_alpha": "no noise is added to texts in a row; a Trainer in Python adds it to padded ones",
    "save_only_model": "without the state of the optimizer a run that is cut off cannot go on",
    "torch_compile": "the model is compiled already",
    "batch_eval_metrics": "the accuracy is that of all held-out examples at once",
}
# Engines under which it was not shown to train, save and go on. With the variable `accelerate launch` asks for one.
ENGINES = {
    "fsdp": "ACCELERATE_USE_FSDP",
    "fsdp_config": "ACCELERATE_USE_FSDP",
    "deepspeed": "ACCELERATE_USE_DEEPSPEED",
}
INSTEAD = (
    "in Python peftc.shard, or peftc.compile_sharded, parts the model; under torchrun each process has a copy here"
)
AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


def parser() -> argparse.ArgumentParser:
    """Reads the options of a training; what is not given is not in the namespace that it makes."""
    made = HfArgumentParser(cast(Any, TrainingArguments), add_help=False, allow_abbrev=False)
    kept = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    group = kept.add_argument_group("transformers' settings", "As in its TrainingArguments; all may stand in --config.")
    for action in made._actions:
        if action.dest in OWN or not action.option_strings:
            continue
        if action.dest in DEFAULTS:
            action.help = f"{action.help} Here: {DEFAULTS[action.dest]}."
        action.default = argparse.SUPPRESS
        group._add_action(action)
    return kept


def names() -> set[str]:
    """Of the settings that may be given."""
    return {field.name for field in dataclasses.fields(TrainingArguments) if field.init} - OWN


def read_config(path: Path, options: Mapping[str, argparse.Action]) -> dict[str, Any]:
    """A YAML file of settings, by the names of the `options` that read them, as the command line would give them.

    Raises:
        PeftcError: `bad-settings`, one for each that is wrong.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PeftcError(BadSettings(where=str(path), reason=" ".join(str(error).split()))) from None
    if not isinstance(found, dict | None):
        raise PeftcError(BadSettings(where=str(path), reason="it has to be settings, a name and a value a line"))
    problems: list[Diagnostic] = []
    settings = {}
    for name, value in (found or {}).items():
        plain = str(name).replace("-", "_")
        if plain not in options:
            near = difflib.get_close_matches(plain, options, 1)
            hint = f"did you mean {near[0]}?" if near else "see peftc train --help"
            problems.append(BadSettings(where=str(path), reason=f"there is no setting {name!r}", hint=hint))
        elif value is not None:  # as where it is left out
            try:
                settings[plain] = _typed(options[plain], value)
            except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
                problems.append(BadSettings(where=str(path), reason=f"{name} is {value!r}", hint=str(error)))
    if problems:
        raise PeftcError(*problems)
    return settings


def _typed(option: argparse.Action, value: Any) -> Any:
    """A value of YAML as an option reads it from words: 2e-4 is a text there. Raises what the option's type raises."""
    if option.nargs == 0:
        return _one_of(value, (True, False))
    if isinstance(value, dict) and option.nargs == "+":  # as --columns has them
        value = [f"{key}={one}" for key, one in value.items()]
    if isinstance(value, list) and value and option.nargs in ("+", "*"):
        return [_word(option, one) for one in value]
    if isinstance(value, list | dict) and option.type is str:  # a setting of transformers', which looks at what it is
        return value
    word = _word(option, value)
    return [word] if option.nargs == "+" else word


def _word(option: argparse.Action, value: Any) -> Any:
    if option.type is None and not isinstance(value, str):
        raise TypeError("expects a text")
    read = option.type(str(value)) if callable(option.type) else value
    return read if option.choices is None else _one_of(read, option.choices)


def _one_of(value: Any, choices: Iterable[Any]) -> Any:
    if value not in choices:
        raise ValueError(f"expects one of {', '.join(str(one) for one in choices)}")
    return value


def arguments(folder: Path, given: Mapping[str, Any]) -> TrainingArguments:
    """transformers' own settings, of those that were given and the defaults here.

    Raises:
        PeftcError: `bad-settings`, where transformers refuses them, or an engine that cannot have the model in parts is
            asked for.
    """
    asked = {name for name, variable in ENGINES.items() if given.get(name) or _is_on(variable)}
    if asked:
        engines = sorted({name.partition("_")[0] for name in asked})
        reason = f"there is no {' and no '.join(engines)} here: this command was not shown to train, save and go on so"
        raise PeftcError(BadSettings(where=WHERE, reason=reason, hint=INSTEAD))
    settings = {**DEFAULTS, **given}
    try:
        made = TrainingArguments(output_dir=str(folder), **settings)
    except (TypeError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise PeftcError(BadSettings(where=WHERE, reason=reason)) from error
    problems = [f"there is no {name} here: {why}" for name, why in REFUSED.items() if getattr(made, name)]
    problems += [f"{name} is {getattr(made, name)}" for name in AT_LEAST_ONE if getattr(made, name) < 1]
    if made.max_steps <= 0 and not made.num_train_epochs > 0:
        problems.append(f"num_train_epochs is {made.num_train_epochs}")
    if not 0 <= made.learning_rate < math.inf:
        problems.append(f"learning_rate is {made.learning_rate}")
    if problems:
        raise PeftcError(*(BadSettings(where=WHERE, reason=reason) for reason in problems))
    return made


def _is_on(variable: str) -> bool:
    """As transformers reads it."""
    return os.environ.get(variable, "").lower() in ("y", "yes", "t", "true", "on", "1")
