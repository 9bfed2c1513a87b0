"""State that starts from a file a spec names: safetensors alone, and only from the spec's own folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from peftc.diagnostics.diagnostic import PeftcError
from peftc.planning.plan import Binding
from peftc.rewrite.errors import BadStateFile

Bad = Callable[[str], PeftcError]
IN_FOLDER = "adapter.safetensors"


def load_start(binding: Binding, tensors: dict[str, Tensor]) -> None:
    """Fills the tensors of `binding` that its method reads from a file, by their full names.

    The path is relative to the spec's folder (the working folder, for a spec that is no file) and must not lead out of
    it, symbolic links resolved.

    Raises:
        PeftcError: `bad-state-file` if it does, or if the file lacks a tensor or has one of another shape.
    """
    asked = binding.method.reads()
    if asked is None:
        return
    name, prefix = asked

    def bad(reason: str) -> PeftcError:
        return PeftcError(BadStateFile(path=name, reason=reason, span=binding.span))

    found = _read(_inside(Path(binding.span.source.name).parent, name, bad), bad)
    for own, tensor in tensors.items():
        if not own.startswith(prefix):
            continue
        full = binding.names[own]
        if full not in found:
            raise bad(f"it has no tensor {full}")
        if found[full].shape != tensor.shape:
            raise bad(f"its {full} is {list(found[full].shape)}, and {list(tensor.shape)} is needed here")
        tensor.copy_(found[full])


def _inside(folder: Path, name: str, bad: Bad) -> Path:
    try:
        path = (folder / name).resolve()
        path = path / IN_FOLDER if path.is_dir() else path
        if not path.resolve().is_relative_to(folder.resolve()):
            raise bad(f"it lies outside {folder.resolve()}, the folder of the spec")
        if not path.is_file():
            raise bad(f"there is no file {path.name} there" if path.parent.is_dir() else "there is no such file")
    except (OSError, ValueError, RuntimeError) as error:
        raise bad(str(error)) from None
    return path


def _read(path: Path, bad: Bad) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise bad(f"it is no safetensors file ({error})") from None
