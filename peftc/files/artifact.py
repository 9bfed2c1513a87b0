"""An artifact: a folder with the spec, the added tensors, and a reference to the base model.

    peftc.json            format, spec, model class and reference, fingerprints; its own checksum
    adapter.safetensors   every tensor that is not simply the base model's

No pickle, and nothing is run or imported because a file here names it. The folder is there whole or not at all, at
every instant (files/folder.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from types import UnionType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from peftc import language as ast
from peftc.capture.checkpoints.checkpoint import digest
from peftc.capture.checkpoints.naming import Reference, parse_reference
from peftc.capture.checkpoints.ondisk import read_tensors
from peftc.capture.checkpoints.untrusted import MOST_LABELS
from peftc.capture.examples.asking import fake_mode_of
from peftc.capture.examples.settled import are_sizes
from peftc.capture.inputs import Example, example_inputs
from peftc.diagnostics.diagnostic import PeftcError
from peftc.diagnostics.reading import read_file
from peftc.diagnostics.source import Source
from peftc.files.errors import BadArtifact, WrongBase
from peftc.files.folder import current, steadily, write_folder
from peftc.graph.ir import get_attribute
from peftc.runtime.module import Runtime

FORMAT = 2
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool,
)}  # fmt: skip
MANIFEST = "peftc.json"
TENSORS = "adapter.safetensors"
LARGEST_MANIFEST = 4 << 20  # bytes; a spec has one at most
FIELDS: dict[str, type | UnionType] = {
    "spec": str, "model": str, "reference": str | None, "dtype": str, "base": str, "frozen": str | None,
    "tensors": str, "example": dict, "labels": int | None,
}  # fmt: skip
# Settings of a config that say where a model came from or how it is called, not what it computes.
INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "problem_type", "id2label",
              "label2id", "architectures"}  # fmt: skip


def save(compiled: Runtime, folder: Path) -> None:
    """Writes the artifact. An artifact that is there is replaced, all at once; any other folder is left alone.

    Raises:
        PeftcError: `bad-artifact` if something else stands at `folder`; `not-in-spec` if the artifact would be without
            something that learnt; `cannot-write` where the system refuses, and what is there stays.
    """
    compiled.watch.refuse_unplanned(compiled)
    tensors = {name: get_attribute(compiled, name).detach() for name in sorted(compiled.plan.added)}
    blob = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    manifest = _manifest(compiled, hashlib.sha256(blob).hexdigest())
    write_folder(folder, {TENSORS: blob, MANIFEST: json.dumps(manifest, indent=2).encode()})


@dataclass(frozen=True)
class Artifact:
    """What a folder holds, read and held against its own checksums: the spec and the tensors that it trains.

    `dtype` is the base model's precision; what else is known of the base is in `manifest`.
    """

    folder: Path
    spec: ast.Spec
    state: dict[str, Tensor]
    manifest: dict[str, Any]

    @property
    def dtype(self) -> str:
        """The base model's precision."""
        return str(self.manifest["dtype"])

    @property
    def base(self) -> str:
        """The folder or hub id that the base was loaded from. An artifact never runs code: no Python file is one.

        Raises:
            PeftcError: `wrong-base` where it is neither.
        """
        name: str | None = self.manifest["reference"]
        if name is None or parse_reference(name).kind != "folder":
            raise self._wrong("it does not say where its base model is")
        return name

    def reference(self, named: Reference) -> Reference:
        """The same with the head that the artifact was made on, which its checkpoint need not have."""
        labels = self.manifest.get("labels")
        if labels is not None and not 0 < labels <= MOST_LABELS:
            raise self._wrong(f"it says that its base has {labels:,} labels")
        return replace(named, model_class=self.manifest["model"], labels=labels)

    def name_classes(self, base: nn.Module) -> None:
        """Has a model that was read for this artifact call its classes as the data called them that it learnt from.

        Raises:
            PeftcError: `bad-artifact`.
        """
        names, config = self.manifest.get("classes"), getattr(base, "config", None)
        if names is None or not isinstance(config, PreTrainedConfig):
            return
        if not (isinstance(names, list) and len(names) == config.num_labels and {*map(type, names)} == {str}):
            raise PeftcError(BadArtifact(folder=str(self.folder), reason=f"{MANIFEST} has no usable classes"))
        config.id2label = dict(enumerate(names))
        config.label2id = {name: place for place, name in enumerate(names)}

    def example(self, base: nn.Module) -> Example:
        """Inputs of the recorded shapes, to capture the same graph with, for a base of the right class.

        Of a base whose weights are there already they are checked.
        """
        self.check_base(base)

        def one(described: Any) -> Tensor:
            shape, dtype = described
            return torch.ones(shape, dtype=DTYPES[dtype], device=next(base.parameters()).device)

        try:
            recorded = self.manifest["example"]
            args = tuple(one(described) for described in recorded["args"])
            kwargs = {name: one(described) for name, described in recorded["kwargs"].items()}
            kwargs |= {name: torch.tensor(value) for name, value in recorded.get("sizes", {}).items()}
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
            reason = "its example inputs cannot be made"
            raise PeftcError(BadArtifact(folder=str(self.folder), reason=reason)) from None
        return example_inputs(base, args or kwargs)

    def check_base(self, base: nn.Module, digests: Mapping[str, str] | None = None) -> None:
        """Raises PeftcError `wrong-base` where it is of another class or, if its weights are there, has others."""
        if type(base).__name__ != self.manifest["model"]:
            raise self._wrong(f"it was made on a {self.manifest['model']}, and this is a {type(base).__name__}")
        if digests is not None or fake_mode_of(base) is None:
            self.check_weights(base, digests)

    def check_weights(self, base: nn.Module, digests: Mapping[str, str] | None = None) -> None:
        """Raises PeftcError `wrong-base` unless the base's weights are those the artifact was made on.

        But for those that it holds itself, such as a trained head: these may be any in the base.
        """
        rest: str | None = self.manifest.get("frozen")  # artifacts before had the whole model's alone
        found = fingerprint(base, digests, self.state if rest is not None else ())
        if found != (self.manifest["base"] if rest is None else rest):
            raise self._wrong("the base model's weights are not the same")

    def _wrong(self, reason: str) -> PeftcError:
        return PeftcError(WrongBase(folder=str(self.folder), reason=reason))


def read(folder: Path) -> Artifact:
    """What `save` wrote.

    Raises:
        PeftcError: `bad-artifact` if anything in the folder is missing, cut short or altered.
    """

    def both() -> tuple[dict[str, Any], dict[str, Tensor]]:
        manifest = _read_manifest(folder)
        return manifest, _read_tensors(folder, manifest)

    manifest, state = steadily(folder, (MANIFEST, TENSORS), both)
    return Artifact(folder, ast.parse(Source(f"{folder.name}/{MANIFEST}", manifest["spec"])), state, manifest)


def fingerprint(model: nn.Module, digests: Mapping[str, str] | None = None, without: Collection[str] = ()) -> str:
    """SHA-256 over what a model computes with: its configuration, and the SHA-256 of every parameter and buffer.

    `digests` has those that are known already, by name, and of a parameter that is not there any more it must. The
    numbers of parameters `without`, by any of their names, do not count: something else stands in their place.
    """
    known = digests or {}
    replaced = {id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False) if name in without}
    whole = hashlib.sha256()
    if isinstance(model, PreTrainedModel):
        settings = {name: value for name, value in model.config.to_dict().items() if name not in INCIDENTAL}
        whole.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in _tensors(model):
        own = "" if id(tensor) in replaced else known[name] if name in known else digest(tensor)
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {own}\n".encode())
    return whole.hexdigest()


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer, a tied one once, by name."""
    return sorted((*model.named_parameters(), *model.named_buffers()), key=itemgetter(0))


def flattened(spec: ast.Spec) -> str:
    """The spec as one text: what it includes stands where it was included."""
    lines: list[str] = []
    for statement in spec.statements:
        included = statement.spec if isinstance(statement, ast.Use) else None
        lines.append(flattened(included) if included else ast.unparse(statement))
    return "\n".join(lines)


def _manifest(compiled: Runtime, tensors: str) -> dict[str, Any]:
    plan, base = compiled.plan, compiled.base
    read = plan.captured.checkpoint.digests if plan.captured.checkpoint else {}
    digests = {name: read[name] if tensor.is_meta else digest(tensor) for name, tensor in _tensors(base)}
    body = {
        "format": FORMAT,
        "spec": flattened(plan.spec),
        "model": type(base).__name__,
        "reference": str(getattr(compiled.config, "_name_or_path", "") or "") or None,
        "dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
        "base": fingerprint(base, digests),
        "frozen": fingerprint(base, digests, plan.trained),
        "tensors": tensors,
        "example": _described(plan.captured.example),
        "labels": getattr(compiled.config, "num_labels", None),
        "classes": _classes(compiled.config),
    }
    return body | {"checksum": _checksum(body)}


def _classes(config: Any) -> list[str] | None:
    """The names of a model's classes, in order, where they are not those that transformers makes up."""
    names = getattr(config, "id2label", None) if isinstance(config, PreTrainedConfig) else None
    if not names or {*names} != {*range(len(names))}:
        return None
    told = [str(names[place]) for place in range(len(names))]
    return None if told == [f"LABEL_{place}" for place in range(len(told))] else told


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    def bad(reason: str, hint: str = "") -> PeftcError:
        return PeftcError(BadArtifact(folder=str(folder), reason=reason, hint=hint))

    try:
        manifest = json.loads(read_file(current(folder, MANIFEST), LARGEST_MANIFEST))
        checksum = manifest.pop("checksum")
    except OSError as error:
        raise bad(f"{MANIFEST} cannot be read: {error.strerror or error}", _instead(folder)) from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise bad(f"{MANIFEST} is cut short or altered") from None
    if checksum != _checksum(manifest):
        raise bad(f"{MANIFEST} was altered: its checksum does not fit")
    if manifest.get("format") != FORMAT:
        raise bad(f"it has format {manifest.get('format')}, and this peftc reads {FORMAT}")
    if wrong := [name for name, kind in FIELDS.items() if not isinstance(manifest.get(name), kind)]:
        raise bad(f"{MANIFEST} has no usable {wrong[0]}")
    return dict(manifest)


def _instead(folder: Path) -> str:
    """What a folder is that is no artifact, and who reads that; of a name that no file can have nothing."""
    if os.path.isfile(folder / "artifact" / MANIFEST):
        return f"a training has its artifact in a folder of its own: {folder / 'artifact'}"
    if os.path.isfile(folder / "adapter_config.json"):
        return "an adapter of HF PEFT's, which peftc.load_peft(model, folder) reads"
    if os.path.isfile(folder / "config.json"):
        return "a whole model, which transformers reads, and peftc compile SPEC MODEL"
    return ""


def _read_tensors(folder: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    try:
        return read_tensors(current(folder, TENSORS), manifest["tensors"])
    except (OSError, ValueError) as error:
        raise PeftcError(BadArtifact(folder=str(folder), reason=f"{TENSORS}: {error}")) from None


def _described(example: Example) -> dict[str, Any]:
    """Shapes and dtypes of the inputs the graph was captured with."""

    def one(tensor: Any) -> Any:
        return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]

    sizes = {name: value.tolist() for name, value in example.constants.items() if are_sizes(name, value)}
    return {
        "args": [one(tensor) for tensor in example.args],
        "kwargs": {name: one(tensor) for name, tensor in example.kwargs.items()},
    } | ({"sizes": sizes} if sizes else {})
