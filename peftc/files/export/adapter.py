"""Low-rank branches as a GGUF adapter, which `llama-cli --lora` puts beside a model: NAME.lora_a and NAME.lora_b.

llama.cpp adds (alpha / r) B A x, with one alpha for the file and r from each pair of tensors. What the base model's
file has in another order, rows of Llama's q and k, B and A have in that order, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from peftc.diagnostics.diagnostic import Diagnostic, PeftcError
from peftc.files.export.branches import Change, changes_of
from peftc.files.export.errors import AS_MERGED, FileThere, NotInGguf
from peftc.files.export.gguf_file import FILE_TYPES, TYPES, Array, Stored, error_of, quietly, read, write
from peftc.files.export.hyperparameters import kind_of
from peftc.files.export.layout import Reader
from peftc.files.folder import new_file
from peftc.runtime.module import Runtime

NO_MODEL = "compile a causal model of transformers, of a kind that it reads GGUF files of"


def export_adapter(compiled: Runtime, path: Path, dtype: str) -> list[Change]:
    """Writes what was learned as an adapter, and returns it.

    Raises:
        PeftcError: `not-in-gguf`, once for each statement that no adapter can hold and each layer that has no place;
            `bad-output` if something is at `path`; `cannot-write`.
    """
    changes, unfit = changes_of(compiled)
    problems: list[Diagnostic] = [NotInGguf(reason=one.reason, instead=AS_MERGED, span=one.span) for one in unfit]
    model = compiled.base
    if not isinstance(model, PreTrainedModel):
        reason = f"a {type(model).__name__} is no model of transformers, which is what says where its weights lie"
        raise PeftcError(*problems, NotInGguf(reason=reason, instead=NO_MODEL))
    with quietly(), torch.no_grad():
        kind = kind_of(model)
        reader = Reader(model, kind.architecture, kind.read)
        fused = reader.out_of_order(model, compiled.plan.sites)
        pairs = {}
        for change in changes:
            pair = _pair(model, reader, change)
            if pair is None or change.parameter in fused:
                reason = fused.get(change.parameter, f"{change.module} has no place there of its own rows and columns")
                problems.append(NotInGguf(reason=reason, instead=AS_MERGED, span=change.span))
            else:
                pairs[reader.names[change.parameter]] = pair
        if not changes and not problems:
            problems.append(NotInGguf(reason="nothing was learned", instead="compile a spec that has a method"))
        if problems:
            raise PeftcError(*problems)
        alpha = changes[0].scale * changes[0].rank
        writer = gguf.GGUFWriter(None, kind.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(FILE_TYPES[dtype])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        tensors = {name: tensor for base, pair in pairs.items() for name, tensor in _named(base, *pair, alpha)}
        with new_file(path, FileThere(file=str(path))) as new:
            kinds = {name: _kind(tensor, dtype) for name, tensor in tensors.items()}
            write(writer, new, [Stored(n, t.shape, kinds[n], partial(_itself, t)) for n, t in tensors.items()])
            _check(new, tensors)
    return changes


def _pair(model: PreTrainedModel, reader: Reader, change: Change) -> tuple[Array, Array, Change] | None:
    """A and B in the order of the base model's file; None where they are no change of a matrix there."""
    shape = tuple(model.get_parameter(change.parameter).shape)
    layout = reader.layout(change.parameter, shape) if change.parameter in reader.names else None
    sides = None if layout is None else layout.sides(shape, change.transposed)
    if sides is None:
        return None
    outputs, inputs = sides
    return change.a.numpy()[:, inputs], change.b.numpy()[outputs], change


def _named(base: str, a: Array, b: Array, change: Change, alpha: float) -> Iterator[tuple[str, Array]]:
    """The two tensors under their names, B with what the file's alpha does not say of the scale."""
    factor = change.scale * change.rank / alpha
    yield f"{base}.lora_a", np.ascontiguousarray(a)
    yield f"{base}.lora_b", np.ascontiguousarray(b if factor == 1 else b * np.float32(factor))


def _kind(tensor: Array, dtype: str) -> gguf.GGMLQuantizationType:
    """How its numbers are kept; in fp32 where a row is no whole number of blocks."""
    kind = TYPES[dtype]
    return TYPES["float32"] if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _itself(tensor: Array) -> Array:
    return tensor


def _check(path: Path, tensors: dict[str, Array]) -> None:
    """Raises PeftcError `not-in-gguf` where a file has other numbers than its kind of them has to round to."""
    for name, kind, found in read(path):
        if not (np.abs(found - tensors[name]) <= error_of(kind, tensors[name])).all():
            reason = f"{name} is read back as other numbers ({kind.name})"
            raise PeftcError(NotInGguf(reason=reason, instead="take dtype float32, which holds whatever was learned"))
