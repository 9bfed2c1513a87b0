"""Models out of references: built on shapes alone, initialised, or read."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils.hub import cached_file

from peftc.capture.checkpoints.bitsandbytes import by_bitsandbytes
from peftc.capture.checkpoints.differences import NO_DIFFERENCES, Differences
from peftc.capture.checkpoints.errors import PRECISIONS, BadReference, NoWeights, UnknownPrecision
from peftc.capture.checkpoints.naming import TASKS, Reference, answering, parse_reference
from peftc.capture.checkpoints.streaming import OpenCheckpoint, open_checkpoint, read_as_a_whole, streams
from peftc.capture.checkpoints.untrusted import BY_YOUR_WORD, check_config, check_folder, few_modules
from peftc.diagnostics.diagnostic import PeftcError
from peftc.graph.surroundings import physical_memory

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in PRECISIONS}
__all__ = [
    "DTYPES", "Loaded", "Reference", "load_model", "opened", "parse_reference", "read_model", "readable",
]  # fmt: skip

AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageClassification",
    "AutoModel",
)


def load_model(
    reference: Reference, *, meta: bool = False, random_weights: bool = False, dtype: str | None = None
) -> tuple[nn.Module, Any]:
    """Builds the model, and its example inputs where a factory gives them.

    The arguments and what is raised are those of `read_model`.
    """
    found = read_model(reference, meta=meta, random_weights=random_weights, dtype=dtype)
    return found.model, found.example


@dataclass(frozen=True)
class Loaded:
    """A model, its example inputs where a factory gives them, and how the checkpoint differs from it."""

    model: nn.Module
    example: Any = None
    differences: Differences = NO_DIFFERENCES


def read_model(
    reference: Reference, *, meta: bool = False, random_weights: bool = False, dtype: str | None = None
) -> Loaded:
    """Builds the model, or reads it.

    Args:
        reference: from `parse_reference`.
        meta: build shapes only, whatever weights there are; a factory builds what it builds.
        random_weights: initialise instead of reading weights.
        dtype: a key of `DTYPES`; the checkpoint's own by default.

    Raises:
        PeftcError: `bad-reference` when it cannot be read, `no-weights` for a bare config without `random_weights`,
            `missing-weights` or `other-shape` where the checkpoint is of another model, `unknown-precision` for another
            dtype.
    """
    if reference.runs_code:
        model, example = _from_factory(reference)
        return Loaded(model if (kind := _asked(dtype)) is None else model.to(kind), example)
    with readable(reference):
        return _from_transformers(reference, meta, random_weights, dtype)


def opened(reference: Reference, *, dtype: str | None = None) -> OpenCheckpoint | None:
    """The reference's checkpoint before a weight of it is read.

    None for what can only be read as a whole: a factory's model, a `.gguf` or `.bin` file, what another library has
    packed.

    Raises:
        PeftcError: as `load_model`.
    """
    if reference.kind != "folder":
        return None
    with readable(reference):
        source = str(reference.path or reference.text)
        config = _config(reference, source)
        cls = _class_for(config, reference, source)
        if not streams(cls, config):
            return None
        return open_checkpoint(
            cls, source, config,
            labels=reference.labels, dtype=_precision(dtype), trust_remote_code=reference.trusted,
        )  # fmt: skip


@contextmanager
def readable(reference: Reference) -> Iterator[None]:
    """What reading a reference may raise, as a PeftcError `bad-reference`.

    Anything: of what others wrote, transformers, huggingface_hub, safetensors, gguf and pickle each make exceptions of
    their own, and an unexpected value ends in any of Python's.
    """
    try:
        with few_modules():
            yield
    except PeftcError:
        raise
    except Exception as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        kind = "" if isinstance(error, OSError | ValueError | ImportError | RuntimeError) else type(error).__name__
        said = said[:2] if said and said[0].endswith(":") else said[:1]
        reason = ": ".join(filter(None, [kind, " ".join(said)])) or type(error).__name__
        if "trust_remote_code" in str(error):
            reason += f" ({BY_YOUR_WORD})"
        raise PeftcError(BadReference(reference=reference.text, reason=reason)) from error


@contextmanager
def _told_of(reference: Reference) -> Iterator[None]:
    """What a factory's own code raises, as a PeftcError `bad-reference` with its line."""
    try:
        yield
    except Exception as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(reference.path)
        ]
        where = f" (line {lines[-1]})" if lines else ""
        said = str(error).partition("\n")[0]  # of a diagnostic, its title
        reason = f"{type(error).__name__}: {said}{where}"
        raise PeftcError(BadReference(reference=reference.text, reason=reason)) from error


def _from_factory(reference: Reference) -> tuple[nn.Module, Any]:
    assert reference.path is not None
    spec = importlib.util.spec_from_file_location(f"peftc_factory_{reference.path.stem}", reference.path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    with _told_of(reference):
        spec.loader.exec_module(module)
    make = getattr(module, reference.factory, None)
    if not callable(make):
        names = [name for name, item in vars(module).items() if callable(item) and not name.startswith("_")]
        reason = f"{reference.path} has no function {reference.factory!r}"
        raise PeftcError(BadReference(reference=reference.text, reason=reason, hint=", ".join(names)))
    with _told_of(reference):
        made = make()
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        reason = f"{reference.factory} returned {type(model).__name__}, not a torch.nn.Module"
        raise PeftcError(BadReference(reference=reference.text, reason=reason))
    return model, example


def _from_transformers(reference: Reference, meta: bool, random_weights: bool, dtype: str | None) -> Loaded:
    path = reference.path
    if reference.kind == "gguf":
        assert path is not None
        source, extra = str(path.parent), {"gguf_file": path.name}
    else:
        source, extra = str(path or reference.text), {}
    config = _config(reference, source, **extra)
    cls = _class_for(config, reference, source)
    kind = _asked(dtype) or getattr(config, "dtype", None) or torch.float32
    if meta or random_weights:
        # A checkpoint's quantisation says how its weights are stored, not what the model is.
        config.__dict__.pop("quantization_config", None)
        with torch.device("meta"):
            model: nn.Module = cls._from_config(config, dtype=kind)
        if meta:
            return Loaded(model)
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        if size > physical_memory():
            raise ValueError(f"its weights take {size:,} bytes, more than the memory of this machine")
        with torch.device("cpu"):
            return Loaded(cls._from_config(config, dtype=kind))
    if reference.kind == "config":
        raise PeftcError(NoWeights(reference=reference.text))
    if by_bitsandbytes(config) and streams(cls, config):
        checkpoint = open_checkpoint(
            cls, source, config,
            labels=reference.labels, dtype=_precision(dtype), trust_remote_code=reference.trusted,
        )  # fmt: skip
        assert checkpoint is not None  # or it was refused
        loaded, differences = checkpoint.load()
        return Loaded(loaded, None, differences)
    model, differences = read_as_a_whole(
        cls, source, called=reference.text, labels=reference.labels, dtype=_precision(dtype),
        trust_remote_code=reference.trusted, **extra,
    )  # fmt: skip
    return Loaded(model, None, differences)


def _config(reference: Reference, source: str, **extra: str) -> Any:
    """The config that a reference has, once its folder is known to be harmless, with the labels that are asked for."""
    config = _own_config(reference, source, **extra)
    if reference.labels is not None and config.num_labels != reference.labels:
        config.num_labels = reference.labels
    return config


def _own_config(reference: Reference, source: str, **extra: str) -> Any:
    if reference.kind == "config":
        check_config(Path(source), trusted=reference.trusted)
        if reference.trusted:
            return _config_with_code(Path(source))
    elif reference.kind == "folder":
        if reference.path is None:
            answering(reference)
        found = reference.path or Path(cached_file(source, "config.json") or "").parent
        check_folder(found, trusted=reference.trusted)
    return transformers.AutoConfig.from_pretrained(source, trust_remote_code=reference.trusted, **extra)


def _config_with_code(path: Path) -> Any:
    """A bare config whose code, if it names any, lies beside it."""
    config = transformers.AutoConfig.from_pretrained(
        str(path.parent), trust_remote_code=True, _configuration_file=path.name
    )
    config._name_or_path = str(path)
    return config


def _asked(dtype: str | None) -> torch.dtype | None:
    if dtype and dtype not in DTYPES:
        raise PeftcError(UnknownPrecision(dtype=str(dtype)))
    return DTYPES[dtype] if dtype else None


def _precision(dtype: str | None) -> torch.dtype | str:
    return _asked(dtype) or "auto"


def _is_config_of(config: Any, cls: type[transformers.PreTrainedModel]) -> bool:
    return cls.config_class is not None and isinstance(config, cls.config_class)


def _class_for(config: Any, reference: Reference, source: str) -> Any:
    """The class the checkpoint was saved from, else the first that transformers has for such a config.

    A class that comes with the folder is taken only where its code may run. What the reference asks for goes first.
    """
    if reference.task:
        mapping = getattr(transformers, TASKS[reference.task])._model_mapping
        if type(config) not in mapping:
            raise ValueError(f"transformers has no {type(config).__name__.removesuffix('Config')} for {reference.task}")
        return mapping[type(config)]
    named = getattr(transformers, reference.model_class, None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel) and _is_config_of(config, named):
        return named
    own = getattr(config, "auto_map", None) or {}
    if reference.trusted and (name := next((own[name] for name in AUTO_CLASSES if name in own), None)):
        beside = source if reference.kind != "config" else str(Path(source).parent)
        return get_class_from_dynamic_module(name, beside)
    for name in getattr(config, "architectures", None) or ():
        cls = getattr(transformers, str(name), None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and _is_config_of(config, cls):
            return cls
    for name in AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(f"transformers has no model class for {type(config).__name__}")
