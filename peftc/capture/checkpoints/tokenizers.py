"""What stands beside a model's weights and reads for it: a tokenizer, a processor of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer

from peftc.capture.checkpoints.errors import NoTokenizer
from peftc.diagnostics.diagnostic import PeftcError


def read_tokenizer(source: str, *, trusted: bool = False) -> Any:
    """The tokenizer in a folder, of a hub's model, beside a config.json or in a .gguf file.

    Args:
        source: where it is.
        trusted: Python code there may run.

    Raises:
        PeftcError: `no-tokenizer`.
    """
    return _read(AutoTokenizer, "tokenizer", source, trusted)


def read_image_processor(source: str, *, trusted: bool = False) -> Any:
    """The same of what makes pixels of images."""
    return _read(AutoImageProcessor, "image processor", source, trusted)


def _read(kind: Any, what: str, source: str, trusted: bool) -> Any:
    path = Path(source)
    place = str(path.parent) if path.is_file() else source
    packed = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    try:
        return kind.from_pretrained(place, trust_remote_code=trusted, **packed)
    except Exception as error:  # libraries that read what others wrote raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise PeftcError(NoTokenizer(what=what, source=source, reason=reason)) from error
