"""A GGUF file written one tensor at a time, and read again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers.utils import logging as transformers_logging

Array = np.ndarray[Any, np.dtype[Any]]

TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
# Tensors that llama.cpp's operations take in fp32 alone, beside vectors and norms.
WHOLE = tuple(
    gguf.TENSOR_NAMES[kind].replace("blk.{bid}", "")
    for kind in (gguf.MODEL_TENSOR.POS_EMBD, gguf.MODEL_TENSOR.TOKEN_TYPES, gguf.MODEL_TENSOR.FFN_GATE_INP)
)


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its name and shape, how its numbers are kept, and what makes them [*shape], fp32."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    make: Callable[[], Array]

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        """The shape in bytes, where it is not kept in numbers that numpy has."""
        return gguf.quant_shape_to_byte_shape(self.shape, self.kind)


def kind_for(name: str, shape: tuple[int, ...], dtype: str) -> gguf.GGMLQuantizationType:
    """How a tensor's numbers are kept in a file of `dtype`: as llama.cpp's own converter chooses."""
    owner = name.removesuffix(".weight")
    if len(shape) < 2 or owner.endswith("_norm") or any(owner.endswith(whole) for whole in WHOLE):
        return TYPES["float32"]
    kind = TYPES[dtype]
    if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:  # whose rows are no whole number of blocks
        return TYPES["float16"]
    return kind


def write(writer: gguf.GGUFWriter, path: Path, tensors: list[Stored]) -> None:
    """Writes a file of which all but the tensors is said, one tensor in memory at a time."""
    for stored in tensors:
        plain = stored.kind in (TYPES["float32"], TYPES["float16"])
        kept = np.dtype({TYPES["float32"]: "f4", TYPES["float16"]: "f2"}.get(stored.kind, "u1"))
        shape = stored.shape if plain else stored.bytes_shape
        size = int(np.prod(shape, dtype=np.int64)) * kept.itemsize
        writer.add_tensor_info(stored.name, shape, kept, size, stored.kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for stored in tensors:
        with np.errstate(over="ignore"):  # what does not fit is found when it is read back
            writer.write_tensor_data(gguf.quantize(stored.make(), stored.kind))
    writer.close()


def read(path: Path) -> Iterator[tuple[str, gguf.GGMLQuantizationType, Array]]:
    """Every tensor of a file by its name, how it is kept, and its numbers as fp32."""
    for tensor in gguf.GGUFReader(path).tensors:
        yield tensor.name, tensor.tensor_type, gguf.dequantize(tensor.data, tensor.tensor_type)


def error_of(kind: gguf.GGMLQuantizationType, tensor: Array) -> Array | float:
    """How far a number may be off that is kept so, at most, for each of a tensor's."""
    size = np.abs(tensor)
    if kind == TYPES["float16"]:
        return size * 2.0**-11 + 2.0**-25
    if kind == TYPES["bfloat16"]:
        return size * 2.0**-8
    if kind == TYPES["q8_0"]:  # half a step of the block's 127, and what fp16 makes of the step
        return float(size.max()) * (0.5 / 127 + 2.0**-10) + 2.0**-24
    return 0.0


@contextmanager
def quietly() -> Iterator[None]:
    """Without what the libraries tell of keys that they do not know."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    own = logging.getLogger("gguf")
    before = own.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    own.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        own.setLevel(before)
        if bars:
            transformers_logging.enable_progress_bar()
