"""A model's settings as a GGUF file says them, and the architecture that a file of it has to name.

The keys are gguf's own, the same for every architecture. Of the architectures that gguf knows, that one is right whose
file transformers reads back as the same settings: what is said twice, or not at all, does not come back so.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from peftc.diagnostics.diagnostic import PeftcError
from peftc.files.artifact import INCIDENTAL
from peftc.files.export.errors import NotInGguf
from peftc.files.export.standin import computes_the_same

# gguf's key -> what transformers' settings call it; the first that a model has counts.
SAID = {
    gguf.Keys.LLM.CONTEXT_LENGTH: ("max_position_embeddings",),
    gguf.Keys.LLM.EMBEDDING_LENGTH: ("hidden_size",),
    gguf.Keys.LLM.BLOCK_COUNT: ("num_hidden_layers",),
    gguf.Keys.LLM.FEED_FORWARD_LENGTH: ("intermediate_size",),
    gguf.Keys.LLM.VOCAB_SIZE: ("vocab_size",),
    gguf.Keys.Attention.HEAD_COUNT: ("num_attention_heads",),
    gguf.Keys.Attention.HEAD_COUNT_KV: ("num_key_value_heads", "num_attention_heads"),
    gguf.Keys.Attention.SLIDING_WINDOW: ("sliding_window",),
    gguf.Keys.LLM.ATTN_LOGIT_SOFTCAPPING: ("attn_logit_softcapping",),
    gguf.Keys.LLM.FINAL_LOGIT_SOFTCAPPING: ("final_logit_softcapping",),
}
EPSILON = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
HEAD = f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.OUTPUT]}.weight"  # there where it is not the embedding's
# Settings that say how a model starts, trains or writes text, and not what it computes of tokens.
IDLE = INCIDENTAL | {"initializer_range", "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id",
                     "unk_token_id", "_model_name_or_path", "model_type", "quantization_config", "output_attentions",
                     "output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder",
                     "reorder_and_upcast_attn", "embd_pdrop", "attn_pdrop", "resid_pdrop"}  # fmt: skip
NOT_READ = "write a folder, by merge() or save_pretrained(), for llama.cpp's own scripts that convert one"


@dataclass(frozen=True)
class Kind:
    """What a file of a model says it is: gguf's name of the architecture, and gguf's keys with what they say.

    `read` are the settings that transformers reads of such a file, as its reader calls them, and `config` what it makes
    of them; `differences` has words for each setting of the model that is another then, or none.
    """

    architecture: str
    said: dict[str, int | float]
    read: dict[str, Any]
    config: PreTrainedConfig
    differences: dict[str, str]


def kind_of(model: PreTrainedModel) -> Kind:
    """The architecture that a file of `model` names: of those that transformers reads as this class, the nearest.

    Where gguf has none of the model's name, one that is read as another class, which computes the same.

    Raises:
        PeftcError: `not-in-gguf` where there is none.
    """
    names = [] if getattr(model.config, "tie_word_embeddings", False) else [HEAD]
    reads_text = hasattr(model.config, "vocab_size")  # else it reads images, or has parts with a config of their own
    architectures = gguf.MODEL_ARCH_NAMES.values() if reads_text else ()
    with tempfile.TemporaryDirectory() as folder:
        tried = (_read(Path(folder), name, _said(model, name), names, model) for name in architectures)
        found = sorted((kind for kind in tried if kind is not None), key=lambda kind: len(kind.differences))
    own = (kind for kind in found if type(kind.config) is type(model.config))
    has_name = _letters(model.config.model_type) in map(_letters, gguf.MODEL_ARCH_NAMES.values())
    others = (kind for kind in found if not has_name and computes_the_same(model, kind.config))
    if (nearest := next(chain(own, others), None)) is None:
        reason = f"of gguf's architectures transformers reads none back as a {model.config.model_type}"
        raise PeftcError(NotInGguf(reason=reason, instead=NOT_READ))
    return nearest


def said_of(model: PreTrainedModel, kind: Kind, names: Iterable[str]) -> Kind:
    """What is read of a file of this kind that has tensors of these names: some settings follow from what is there."""
    with tempfile.TemporaryDirectory() as folder:
        found = _read(Path(folder), kind.architecture, kind.said, names, model)
    assert found is not None  # of fewer names it was
    return found


def differences(config: PreTrainedConfig, read: PreTrainedConfig) -> dict[str, str]:
    """Every setting of `config` that what was read back has another value of, with words for it."""
    before, after = config.to_dict(), read.to_dict()
    return {
        name: f"its {name}={before[name]} has no place there, and is read back as {after.get(name)}"
        for name in before
        if name not in IDLE and not name.endswith("dropout") and not _equal(before[name], after.get(name))
    }


def _equal(one: Any, other: Any) -> bool:
    """Whether two settings are the same; numbers are fp32 in a file."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, float | int):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _read(
    folder: Path, architecture: str, said: dict[str, int | float], names: Iterable[str], model: PreTrainedModel
) -> Kind | None:
    """What a file that names `architecture` is read as; None where that is another kind of model, or nothing."""
    path = folder / "header.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in said.items():
        add(writer, key, value)
    for name in names:  # by what is there the reader knows some settings; of what size is all the same
        writer.add_tensor(name, np.zeros(1, np.float32))
    if not names:
        writer.add_tensor("none", np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    try:
        read = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
        config = AutoConfig.from_pretrained(str(folder), gguf_file=path.name)
    except Exception:  # what the reader does not know ends in any of Python's errors
        return None
    config.vocab_size = model.config.vocab_size  # which it may count in a tokenizer that is not there yet
    return Kind(architecture, said, read, config, differences(model.config, config))


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


def add(writer: gguf.GGUFWriter, key: str, value: int | float) -> None:
    """Adds a number to a file, whole ones as such."""
    if isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def _said(model: PreTrainedModel, architecture: str) -> dict[str, int | float]:
    return {key.format(arch=architecture): value for key, value in _settings(model.config)}


def _settings(config: PreTrainedConfig) -> Iterator[tuple[str, int | float]]:
    for key, names in SAID.items():
        if (value := _first(config, names)) is not None:
            yield key, value
    if (epsilon := _first(config, EPSILON)) is not None:  # a file names the norm, a setting mostly does not
        yield gguf.Keys.Attention.LAYERNORM_EPS, float(epsilon)
        yield gguf.Keys.Attention.LAYERNORM_RMS_EPS, float(epsilon)
    width = _first(config, ("head_dim",))
    if width is not None:
        yield gguf.Keys.Attention.KEY_LENGTH, width
        yield gguf.Keys.Attention.VALUE_LENGTH, width
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if "rope_theta" in rope:
        yield gguf.Keys.Rope.FREQ_BASE, float(rope["rope_theta"])
        width = config.hidden_size // config.num_attention_heads if width is None else width
        yield gguf.Keys.Rope.DIMENSION_COUNT, int(width * rope.get("partial_rotary_factor", 1.0))


def _first(config: PreTrainedConfig, names: tuple[str, ...]) -> int | float | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int | float)), None)
