"""A model's folder, looked at before transformers reads it: it may be of others, and nothing in it is obeyed blindly.

Its JSON files are regular ones of a sensible size, what counts layers is a number of layers, an index names files of
the folder, and code runs by the user's own word alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from peftc.capture.checkpoints.ondisk import check_header
from peftc.diagnostics.reading import read_file

MOST_CONFIG, MOST_INDEX = 4 << 20, 64 << 20  # bytes; an index has a line for every tensor
MOST_TEXT = 256 << 20  # of any other file that is read as a whole, such as a tokenizer's
MOST_LAYERS, MOST_LABELS = 2_000, 100_000
MOST_MODULES = 100_000
CONFIGS = ("config.json", "generation_config.json")
TEXTS = (".json", ".txt", ".model", ".jinja")
BY_YOUR_WORD = "code of others runs with --trust-remote-code (trust_remote_code=True) alone"
ADAPTER = "adapter_config.json"
_LAYERS = re.compile(r"(n|num)_(.+_)?(layers?|blocks?)|(.+_)?(layers|depths?)")
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def check_folder(folder: Path, *, trusted: bool) -> None:
    """Whether a folder may be handed to transformers.

    Args:
        folder: with a config.json.
        trusted: its code may run.

    Raises:
        ValueError, OSError: where it may not.
    """
    for name in CONFIGS:
        if (folder / name).exists():
            check_config(folder / name, trusted=trusted)
    if (folder / ADAPTER).exists():
        raise ValueError(
            f"it has an {ADAPTER}, too: an adapter of HF PEFT is read by peftc.load_peft, onto its base model"
        )
    for index in sorted(folder.glob("*.index.json")):
        _check_index(index)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            check_header(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path.name}: {error}") from None
    for path in folder.iterdir():
        if path.suffix in TEXTS and path.is_file() and path.stat().st_size > MOST_TEXT:
            raise ValueError(f"{path.name} is larger than {MOST_TEXT >> 20} MiB")


def check_config(path: Path, *, trusted: bool) -> None:
    """The same of a config.json by itself."""
    _check_settings(_read(path, MOST_CONFIG), trusted)


def _read(path: Path, most: int) -> dict[str, Any]:
    try:
        read = json.loads(read_file(path, most))
    except OSError as error:
        raise ValueError(f"{path.name}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON ({error})") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return read


def _check_settings(settings: dict[str, Any], trusted: bool) -> None:
    for name, value in settings.items():
        most = MOST_LABELS if name == "num_labels" else MOST_LAYERS if _LAYERS.fullmatch(name) else None
        if most is not None:
            counts = value if isinstance(value, list) else [value]
            if odd := [count for count in counts if isinstance(count, int | float) and not 0 <= count <= most]:
                raise ValueError(f"{name} is {odd[0]:g}, and peftc takes 0 to {most:,}")
        if name in _KERNELS and not trusted and "/" in str(value):
            raise ValueError(f"{name} is {value!r}: {BY_YOUR_WORD}")
        if isinstance(value, dict):
            _check_settings(value, trusted)


def _check_index(path: Path) -> None:
    """The files that an index names lie beside it, if anywhere: which of several indices is read, it does not know."""
    files = _read(path, MOST_INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{path.name} has no usable weight_map")
    for name in sorted(set(files.values())):
        way = PurePosixPath(name)
        if way.is_absolute() or ".." in way.parts or "\\" in name or "\0" in name:
            raise ValueError(f"{path.name} names {name!r}, which is not in the folder")
        if (path.parent / name).exists() and not (path.parent / name).is_file():
            raise ValueError(f"{path.name} names {name!r}, which is no regular file")


@contextmanager
def few_modules() -> Iterator[None]:
    """Stops the making of a model that has more modules than any has: a config may ask for what never ends."""
    count = 0

    def counted(_owner: nn.Module, name: str, _module: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > MOST_MODULES:
            raise ValueError(f"it has more than {MOST_MODULES:,} modules ({name} is one of them)")

    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()
