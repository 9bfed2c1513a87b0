"""A compiled model in the form of another runtime: llama.cpp's GGUF files, or the folders that vLLM serves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftc.diagnostics.diagnostic import PeftcError
from peftc.files.export import adapter, merged, vllm
from peftc.files.export.errors import UnknownExport
from peftc.files.export.gguf_file import TYPES
from peftc.files.export.tokenizer import tokenizer_for
from peftc.runtime.module import Runtime

GGUF, VLLM = "gguf", "vllm"
RUNTIMES = (GGUF, VLLM)
DTYPES = {GGUF: tuple(TYPES), VLLM: tuple(name for name in TYPES if name != "q8_0")}


@dataclass(frozen=True)
class Exported:
    """What was written: a file or a folder at `path`, `tensors` in it, and of an adapter the largest `rank`."""

    path: Path
    tensors: int
    rank: int | None = None


def check(to: str, dtype: str | None) -> None:
    """Raises PeftcError `unknown-export` for a runtime or a dtype that there is not."""
    if to not in RUNTIMES:
        raise PeftcError(UnknownExport(what="runtime", given=to, known=RUNTIMES))
    if dtype is not None and dtype not in DTYPES[to]:
        raise PeftcError(UnknownExport(what=f"dtype of {to}", given=dtype, known=DTYPES[to]))


def export_adapter(compiled: Runtime, to: str, path: Path, dtype: str | None) -> Exported:
    """Writes what was learned beside the base model, which stays as it is; see `CompiledModule.export`."""
    check(to, dtype)
    if to == VLLM:
        changes = vllm.export_adapter(compiled, path, dtype)
    else:
        changes = adapter.export_adapter(compiled, path, dtype or "float32")
    return Exported(path, 2 * len(changes), max(change.rank for change in changes))


def export_merged(compiled: Runtime, to: str, path: Path, dtype: str | None, tokenizer: Any) -> Exported:
    """Writes the model with what was learned in its weights; see `CompiledModule.export`."""
    check(to, dtype)
    where = getattr(getattr(compiled, "config", None), "_name_or_path", None)
    words = tokenizer_for(where if tokenizer is None else tokenizer)
    if to == VLLM:
        return Exported(path, vllm.export_merged(compiled, path, dtype, words))
    own = str(next(compiled.base.parameters()).dtype).removeprefix("torch.")
    return Exported(path, merged.export_merged(compiled, path, dtype or (own if own in TYPES else "float32"), words))
