"""`save` and `load`: a folder with the spec, the added tensors, and a reference to the base model.

    peftc.json            format, spec, model class and reference, fingerprints; its own checksum
    adapter.safetensors   every tensor that is not simply the base model's

No pickle, and nothing is run or imported because a file here names it. The folder is written under a temporary name,
synced and renamed, so it is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from types import UnionType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftc.capture.checkpoint import digest
from peftc.capture.inputs import Example, example_inputs, fake_mode_of
from peftc.capture.references import parse_reference
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.source import Source
from peftc.diagnostics.timings import Timings
from peftc.driver import pipeline
from peftc.driver.loading import load_and_plan
from peftc.files.errors import BadArtifact, WrongBase
from peftc.graph.ir import get_attribute
from peftc.language import syntax as ast
from peftc.planning.planner import Plan
from peftc.runtime.module import CompiledModule
from peftc.runtime.statedict import added_names
from peftc.runtime.unfrozen import refuse_unplanned

FORMAT = 2
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool,
)}  # fmt: skip
MANIFEST = "peftc.json"
TENSORS = "adapter.safetensors"
FIELDS: dict[str, type | UnionType] = {
    "spec": str, "model": str, "reference": str | None, "dtype": str, "base": str, "tensors": str, "example": dict,
}  # fmt: skip
# Settings of a config that say where a model came from or how it is called, not what it computes.
INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "problem_type", "id2label",
              "label2id", "architectures"}  # fmt: skip


def save(compiled: CompiledModule, folder: Path) -> None:
    """Writes the artifact. An artifact that is there is replaced; any other folder is left alone.

    Raises:
        PeftcError: `bad-artifact` if something else stands at `folder`; `not-in-spec` if the artifact would be without
            something that learnt.
    """
    refuse_unplanned(compiled)
    tensors = {name: get_attribute(compiled, name).detach() for name in sorted(added_names(compiled.plan))}
    blob = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    manifest = _manifest(compiled, hashlib.sha256(blob).hexdigest())
    write_folder(folder, {TENSORS: blob, MANIFEST: json.dumps(manifest, indent=2).encode()})


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Writes `files` into a folder, which is new or replaced as a whole; other files in it are left alone.

    Where there are other files, such as a Trainer's, each file is replaced by itself, the last one last.

    Raises:
        PeftcError: `bad-artifact` if something that is no folder, or a folder of other things, stands at `folder`.
    """
    folder = folder.absolute()
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.exists() and (not folder.is_dir() or (there and not there & files.keys())):
        raise PeftcError(BadArtifact(folder=str(folder), reason="something else is there, and is left alone"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, data in files.items():
            _write(temporary / name, data)
        if there <= files.keys():
            _replace(temporary, folder)
        else:
            for name in files:
                os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(folder: str | Path, model: nn.Module | str | Path | None = None) -> CompiledModule:
    """The compiled model that was saved at `folder`, on its base model.

    Args:
        folder: what `CompiledModule.save` wrote.
        model: the base model, or a reference to it. Without it, the folder or hub id that the base was loaded from is
            read again; a model from a Python file must be passed, since an artifact never runs code.

    Raises:
        PeftcError: `bad-artifact` if anything in the folder is missing, cut short or altered; `wrong-base` if the
            base model's weights are not those the artifact was made on.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    state = _read_tensors(folder, manifest)
    spec = ast.parse(Source(f"{folder.name}/{MANIFEST}", manifest["spec"]))

    def example(base: nn.Module, _given: Any) -> Example:
        _check_base(folder, manifest, base)
        return _example(folder, base, manifest)

    base = model if model is not None else _base_reference(folder, manifest)
    plan = load_and_plan(base, spec, example, Timings(), dtype=manifest["dtype"])
    check_tensors(folder, plan, state)
    compiled = pipeline.build(plan, Timings(), state)
    if plan.captured.checkpoint is not None:
        _check_weights(folder, manifest, compiled.base, plan.captured.checkpoint.digests)
    return compiled


def fingerprint(model: nn.Module, digests: Mapping[str, str] | None = None) -> str:
    """SHA-256 over what a model computes with: its configuration, and the SHA-256 of every parameter and buffer.

    `digests` has these of parameters that are not there any more, by name.
    """
    known = digests or {}
    whole = hashlib.sha256()
    if isinstance(model, PreTrainedModel):
        settings = {name: value for name, value in model.config.to_dict().items() if name not in INCIDENTAL}
        whole.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted((*model.named_parameters(), *model.named_buffers()), key=itemgetter(0)):
        own = known[name] if tensor.is_meta else digest(tensor)
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {own}\n".encode())
    return whole.hexdigest()


def flattened(spec: ast.Spec) -> str:
    """The spec as one text: what it includes stands where it was included."""
    lines: list[str] = []
    for statement in spec.statements:
        included = statement.spec if isinstance(statement, ast.Use) else None
        lines.append(flattened(included) if included else ast.unparse(statement))
    return "\n".join(lines)


def _manifest(compiled: CompiledModule, tensors: str) -> dict[str, Any]:
    plan, base = compiled.plan, compiled.base
    body = {
        "format": FORMAT,
        "spec": flattened(plan.spec),
        "model": type(base).__name__,
        "reference": str(getattr(compiled.config, "_name_or_path", "") or "") or None,
        "dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
        "base": fingerprint(base, plan.captured.checkpoint.digests if plan.captured.checkpoint else None),
        "tensors": tensors,
        "example": _described(plan.captured.example),
    }
    return body | {"checksum": _checksum(body)}


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _replace(temporary: Path, folder: Path) -> None:
    """Renames into place; what stood there is removed only when the new one stands."""
    os.chmod(temporary, 0o755)  # mkdtemp's folder is for the owner alone
    if not folder.exists():
        temporary.rename(folder)
        return
    old = folder.with_name(f"{temporary.name}.old")
    folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    def bad(reason: str) -> PeftcError:
        return PeftcError(BadArtifact(folder=str(folder), reason=reason))

    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        checksum = manifest.pop("checksum")
    except FileNotFoundError:
        raise bad(f"there is no {MANIFEST}") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError):
        raise bad(f"{MANIFEST} is cut short or altered") from None
    if checksum != _checksum(manifest):
        raise bad(f"{MANIFEST} was altered: its checksum does not fit")
    if manifest.get("format") != FORMAT:
        raise bad(f"it has format {manifest.get('format')}, and this peftc reads {FORMAT}")
    if wrong := [name for name, kind in FIELDS.items() if not isinstance(manifest.get(name), kind)]:
        raise bad(f"{MANIFEST} has no usable {wrong[0]}")
    return dict(manifest)


def _read_tensors(folder: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    try:
        blob = (folder / TENSORS).read_bytes()
    except OSError:
        raise PeftcError(BadArtifact(folder=str(folder), reason=f"there is no {TENSORS}")) from None
    if hashlib.sha256(blob).hexdigest() != manifest["tensors"]:
        reason = f"{TENSORS} is cut short or altered: its checksum does not fit"
        raise PeftcError(BadArtifact(folder=str(folder), reason=reason))
    return safetensors.torch.load(blob)


def check_tensors(folder: Path, plan: Plan, state: dict[str, Tensor]) -> None:
    """Every planned tensor is there in its shape, and no other."""
    planned = {name: spec.shape for name, spec in plan.tensors.items()}
    planned |= {name: tuple(get_attribute(plan.captured.module, name).shape) for name in plan.trained}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if odd := sorted({name for name, _ in found.items() ^ planned.items()}):
        raise PeftcError(BadArtifact(folder=str(folder), reason=f"the tensors do not fit the spec: {odd[0]}"))


def _base_reference(folder: Path, manifest: dict[str, Any]) -> str:
    name: str | None = manifest["reference"]
    if name is None or parse_reference(name).kind != "folder":
        raise PeftcError(WrongBase(folder=str(folder), reason="it does not say where its base model is"))
    return name


def _check_base(folder: Path, manifest: dict[str, Any], model: nn.Module) -> None:
    """Of a model whose weights are not there yet they are checked later."""
    if type(model).__name__ != manifest["model"]:
        reason = f"it was made on a {manifest['model']}, and this is a {type(model).__name__}"
        raise PeftcError(WrongBase(folder=str(folder), reason=reason))
    if fake_mode_of(model) is None:
        _check_weights(folder, manifest, model)


def _check_weights(
    folder: Path, manifest: dict[str, Any], model: nn.Module, digests: Mapping[str, str] | None = None
) -> None:
    if fingerprint(model, digests) != manifest["base"]:
        raise PeftcError(WrongBase(folder=str(folder), reason="the base model's weights are not the same"))


def _described(example: Example) -> dict[str, Any]:
    """Shapes and dtypes of the inputs the graph was captured with."""

    def one(tensor: Any) -> Any:
        return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]

    return {
        "args": [one(tensor) for tensor in example.args],
        "kwargs": {name: one(tensor) for name, tensor in example.kwargs.items()},
    }


def _example(folder: Path, model: nn.Module, manifest: dict[str, Any]) -> Example:
    """Inputs of the recorded shapes, to capture the same graph with."""

    def one(described: Any) -> Tensor:
        shape, dtype = described
        return torch.ones(shape, dtype=DTYPES[dtype], device=next(model.parameters()).device)

    try:
        recorded = manifest["example"]
        args = tuple(one(described) for described in recorded["args"])
        kwargs = {name: one(described) for name, described in recorded["kwargs"].items()}
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        raise PeftcError(BadArtifact(folder=str(folder), reason="its example inputs cannot be made")) from None
    return example_inputs(model, args or kwargs)
