"""A merged model as one GGUF file, which is read again before it is there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from peftc.diagnostics.diagnostic import PeftcError
from peftc.files.export import rope
from peftc.files.export.errors import FileThere, NotInGguf
from peftc.files.export.gguf_file import FILE_TYPES, TYPES, Stored, error_of, kind_for, quietly, read, write
from peftc.files.export.hyperparameters import NOT_READ, Kind, add, differences, kind_of, said_of
from peftc.files.export.layout import Layout, Reader, stored_parameters
from peftc.files.export.rope import slowed
from peftc.files.export.tokenizer import Vocabulary
from peftc.files.folder import new_file
from peftc.files.merge import merge
from peftc.protocol.site import Attention, Site
from peftc.runtime.module import Runtime

OTHER_DTYPE = "take another dtype: float32 holds whatever the model does"


def export_merged(compiled: Runtime, path: Path, dtype: str, tokenizer: Any) -> int:
    """Writes the merged model, and returns how many tensors that are.

    Raises:
        PeftcError: as `merge`; `not-in-gguf`, once for each thing that a file cannot hold; `bad-output` if something is
            at `path`; `cannot-write`.
    """
    model = merge(compiled)
    if not isinstance(model, PreTrainedModel):
        reason = f"a {type(model).__name__} is no model of transformers, which is what reads one"
        raise PeftcError(NotInGguf(reason=reason, instead=NOT_READ))
    with quietly(), torch.no_grad():
        file = GgufModel(model, compiled.plan.sites)
        vocabulary = Vocabulary(tokenizer, model.config.vocab_size)
        with new_file(path, FileThere(file=str(path))) as new:
            tensors = file.write(new, dtype, vocabulary)
            file.check(new)
            vocabulary.check(new)
    return tensors


@dataclass(frozen=True)
class Placed:
    """A parameter, and where its numbers lie in a file."""

    name: str
    parameter: Tensor
    layout: Layout


class GgufModel:
    """A model as a GGUF file holds it. `sites` are those of the model: what a file says is held against them.

    Raises:
        PeftcError: `not-in-gguf`, once for each thing that a file cannot hold.
    """

    def __init__(self, model: PreTrainedModel, sites: Iterable[Site]) -> None:
        self._model = model
        parameters = stored_parameters(model)
        kind = kind_of(model)
        self._reader = Reader(model, kind.architecture, kind.read)
        names = self._reader.names
        self._placed = {
            name: Placed(names[name], tensor, layout)
            for name, tensor in parameters.items()
            if name in names and (layout := self._reader.layout(name, tuple(tensor.shape))) is not None
        }
        self._kind = self._with_widths(kind)
        self._slowed = slowed(model.config, kind.architecture)
        unplaced = [f"{name} has no place there, that transformers reads it from" for name in parameters
                    if name not in self._placed]  # fmt: skip
        reasons = [*unplaced, *self._unsaid(), *self._misread(sites)]
        if reasons:
            raise PeftcError(*(NotInGguf(reason=reason, instead=NOT_READ) for reason in reasons))

    def write(self, path: Path, dtype: str, vocabulary: Vocabulary) -> int:
        """Writes the file, with a tokenizer, and returns how many tensors are in it."""
        writer = gguf.GGUFWriter(None, self._kind.architecture)
        writer.add_type(gguf.GGUFType.MODEL)
        name = Path(str(self._model.config._name_or_path or "")).name
        writer.add_name(name)  # by which llama.cpp knows some tokenizers' tokens; none if it is empty
        for key, value in self._kind.said.items():
            add(writer, key, value)
        if self._slowed is not None:
            self._slowed.add_to(writer)
        writer.add_file_type(FILE_TYPES[dtype])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        vocabulary.add_to(writer)
        tensors = [self._stored(placed, dtype) for placed in self._placed.values()]
        if self._slowed is not None and self._slowed.alike is None:
            factors = self._slowed.factors
            tensors.append(Stored(rope.NAME, tuple(factors.shape), TYPES["float32"], factors.numpy))
        write(writer, path, tensors)
        return len(tensors)

    def check(self, path: Path) -> None:
        """Raises PeftcError `not-in-gguf` unless transformers reads this model of a file, as far as its numbers go."""
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        reasons = [*self._unsaid_of(differences(self._model.config, config)), *self._lost(path)]
        if type(config) is not type(self._kind.config):
            reasons.append(f"it is read back as a {config.model_type}")
        if reasons:
            raise PeftcError(*(NotInGguf(reason=reason, instead=OTHER_DTYPE) for reason in reasons))

    def _stored(self, placed: Placed, dtype: str) -> Stored:
        shape = placed.layout.shape
        kind = kind_for(placed.name, shape, dtype)
        return Stored(placed.name, shape, kind, partial(placed.layout.of, placed.parameter))

    def _lost(self, path: Path) -> Iterator[str]:
        """What is read back as other numbers than the file's kind of them has to round to, as words."""
        by_name = {placed.name: placed for placed in self._placed.values()}
        for name, kind, tensor in read(path):
            if name == rope.NAME:
                continue
            placed = by_name.pop(name)
            wanted = placed.parameter.detach().float().cpu().numpy()
            found = self._reader.read(name, tensor)
            allowed = error_of(kind, wanted) + np.abs(placed.layout.shift) * (1 + np.abs(wanted)) * 2.0**-23
            if found is None or not (np.abs(found - wanted) <= allowed).all():
                yield f"{name} is read back as other numbers ({kind.name})"
        yield from (f"{name} is not there" for name in by_name)

    def _with_widths(self, kind: Kind) -> Kind:
        """With the width of the feed-forward that the weights have, where no setting says it."""
        key = gguf.Keys.LLM.FEED_FORWARD_LENGTH.format(arch=kind.architecture)
        down = f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.FFN_DOWN].format(bid=0)}.weight"
        found = next((placed.layout.shape[-1] for placed in self._placed.values() if placed.name == down), None)
        said = kind.said if found is None else kind.said | {key: found}
        return replace(kind, said=said)

    def _unsaid(self) -> list[str]:
        """Settings that a file does not say, as words."""
        kind = said_of(self._model, self._kind, [placed.name for placed in self._placed.values()])
        context = gguf.Keys.LLM.CONTEXT_LENGTH.format(arch=kind.architecture)
        missing = [] if context in kind.said else ["no setting says how long its texts may be"]
        return [*self._unsaid_of(kind.differences), *missing]

    def _unsaid_of(self, differences: dict[str, str]) -> list[str]:
        """Without what the file does say, and the reader passes by."""
        return [words for name, words in differences.items() if name != rope.SETTING or self._slowed is None]

    def _misread(self, sites: Iterable[Site]) -> Iterator[str]:
        """Where a file would say another attention than the model has, as words, once for each kind of fault."""
        there = list(sites)
        heads = (words for site in there if isinstance(site, Attention) for words in self._other_heads(site))
        fused = self._reader.out_of_order(self._model, there)
        return iter(dict.fromkeys([*heads, *self._other_scales(), *fused.values()]))

    def _other_heads(self, site: Attention) -> Iterator[str]:
        keys = gguf.Keys.Attention
        for key, own in ((keys.HEAD_COUNT, site.heads), (keys.HEAD_COUNT_KV, site.kv_heads)):
            said = self._kind.said.get(key.format(arch=self._kind.architecture))
            if own and said is not None and said != own:
                yield f"{key.rpartition('.')[2]} would be {said} in it, and {site.name} has {own}"

    def _other_scales(self) -> Iterator[str]:
        """Attentions that multiply by another number than 1/sqrt(width of a head), which no file says."""
        for name, module in self._model.named_modules():
            scale, width = getattr(module, "scaling", None), getattr(module, "head_dim", None)
            if isinstance(scale, float) and isinstance(width, int) and not math.isclose(scale, width**-0.5):
                own = name.rpartition(".")[2]
                yield f"{own} multiplies by {scale:.4g}, and a file's attention by {width**-0.5:.4g}"
