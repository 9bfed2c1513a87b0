"""Where a model's parameters lie in a GGUF file: transformers' own reading of one, turned round.

transformers reads a tensor of a file into a parameter by moving its numbers, as llama.cpp interleaves the rows of
Llama's q and k, and by adding one constant, as llama.cpp keeps Gemma's norms one higher. Which numbers go where is
asked of it with counted ones; what moves them in another way is refused. Nothing here knows an architecture.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from peftc.protocol.site import Linear, Site

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Layout:
    """How a tensor of a file is made of a parameter: number i of it is number `taken[i]` of the parameter, + `shift`.

    `shape` is the tensor's, row-major; `taken` is None where nothing moves.
    """

    shape: tuple[int, ...]
    taken: Array | None
    shift: float

    def of(self, parameter: Tensor) -> Array:
        """The tensor [*shape] for a parameter, fp32."""
        flat = parameter.detach().float().cpu().reshape(-1).numpy()
        moved = flat if self.taken is None else flat[self.taken]
        return np.ascontiguousarray((moved + np.float32(self.shift) if self.shift else moved).reshape(self.shape))

    def sides(self, shape: tuple[int, ...], transposed: bool) -> tuple[Array, Array] | None:
        """Of which output each row of a layer's tensor [n_out, n_in] is, and of which input each column.

        The parameter [n_out, n_in] has `shape`, or [n_in, n_out] where it is `transposed`. None where an output lies
        in more rows than one: a low-rank change of the parameter would be none of the tensor.
        """
        if len(shape) != 2 or len(self.shape) != 2 or self.shift:
            return None
        if self.taken is None:
            return None if transposed else (np.arange(shape[0]), np.arange(shape[1]))
        first, second = np.divmod(self.taken.reshape(self.shape), shape[1])
        outputs, inputs = (second, first) if transposed else (first, second)
        separate = (outputs == outputs[:, :1]).all() and (inputs == inputs[:1]).all()
        return (outputs[:, 0], inputs[0]) if separate else None


class _Shallow:
    """A model as who maps names looks at it, with its backbone and nothing below: it looks for names in every module,
    in a table that it makes anew for each, and has them all after these two.
    """

    def __init__(self, model: nn.Module, below: Mapping[str, nn.Module] | None = None) -> None:
        self._model = model
        prefix = getattr(model, "base_model_prefix", "")
        backbone = getattr(model, prefix, None) if below is None and prefix else None
        self._below = {prefix: backbone} if isinstance(backbone, nn.Module) else {}

    def state_dict(self) -> dict[str, Tensor]:
        return self._model.state_dict()

    def named_children(self) -> list[tuple[str, _Shallow]]:
        return [(name, _Shallow(module, {})) for name, module in self._below.items()]


class Reader:
    """transformers' reader of files of one architecture, for one model.

    `config` are the settings that it reads from such a file, as it calls them.
    """

    def __init__(self, model: PreTrainedModel, architecture: str, config: Mapping[str, Any]) -> None:
        processors: dict[str, Any] = TENSOR_PROCESSORS  # which have no types, as what maps names
        names_of: Any = get_gguf_hf_weights_map
        self._processor = processors.get(architecture, TensorProcessor)(config=dict(config))
        layers = model.config.num_hidden_layers
        self._names: dict[str, str] = names_of(_Shallow(model), self._processor, architecture, layers)
        self._layouts: dict[tuple[str, tuple[int, ...]], Layout | None] = {}
        self.names = {parameter: name for name, parameter in self._names.items()}

    def read(self, name: str, tensor: Array) -> Array | None:
        """The parameter that the reader makes of a file's tensor, or None where it makes none of this one alone."""
        kept: dict[str, Any] = {"tensors": {}}
        try:
            made = self._processor.process(
                weights=tensor, name=name, tensor_key_mapping=self._names, parsed_parameters=kept
            )
        except (ValueError, IndexError, TypeError, KeyError):  # of another shape than this tensor can be
            return None
        if made.name == name:
            return np.asarray(made.weights)
        whole = kept["tensors"].get(self._names[name])
        return None if whole is None else np.asarray(whole)

    def layout(self, parameter: str, shape: tuple[int, ...]) -> Layout | None:
        """How the tensor of a parameter is made of it; None where that cannot be told."""
        name = self.names[parameter]
        alike = re.sub(r"\d+", "0", name), shape
        if alike not in self._layouts:
            shapes = dict.fromkeys((shape, shape[::-1], tuple(size for size in shape if size != 1)))
            tried = (self._tried(name, shape, stored) for stored in shapes)
            self._layouts[alike] = next((found for found in tried if found is not None), None)
        return self._layouts[alike]

    def out_of_order(self, model: nn.Module, sites: Iterable[Site]) -> dict[str, str]:
        """Weights that q, k and v have together, of which a file's has not all of q, all of k and all of v in turn.

        By the parameter's name, with words for it. llama.cpp takes a fused weight so, whatever order the model has.
        """
        parts: dict[str, list[tuple[int, Linear]]] = defaultdict(list)
        for site in sites:
            if isinstance(site, Linear) and site.rows is not None and site.owner in self.names:
                place = next((at for at, part in enumerate("qkv") if f"attn.{part}" in site.roles), None)
                if place is not None:
                    parts[site.owner].append((place, site))
        said = "would not have all of q, all of k and all of v in turn, as a file's has"
        return {
            owner: f"{owner} {said}" for owner, found in parts.items()
            if not self._in_order(owner, tuple(model.get_parameter(owner).shape), found)
        }  # fmt: skip

    def _in_order(self, owner: str, shape: tuple[int, ...], found: list[tuple[int, Linear]]) -> bool:
        layout = self.layout(owner, shape)
        sides = None if layout is None else layout.sides(shape, found[0][1].transposed)
        if sides is None:
            return False
        row_of, end = np.argsort(sides[0]), 0
        for _, site in sorted(found, key=lambda part: part[0]):
            rows = np.sort(row_of[list(site.rows or ())])
            if rows[0] != end or rows[-1] - rows[0] + 1 != len(rows):
                return False
            end = int(rows[-1]) + 1
        return True

    def _tried(self, name: str, shape: tuple[int, ...], stored: tuple[int, ...]) -> Layout | None:
        none = np.broadcast_to(np.float32(0), stored)  # takes no memory
        zeros = self.read(name, none)
        if zeros is not None and zeros is none and shape == stored:
            return Layout(shape, None, 0.0)
        if zeros is None or zeros.shape != shape or not zeros.size or (zeros != zeros.flat[0]).any():
            return None
        constant = zeros.flat[0]
        counted = self.read(name, np.arange(zeros.size).reshape(stored))
        if counted is None:
            return None
        from_where = counted.reshape(-1) - int(constant)
        taken = np.full(zeros.size, -1)
        if constant != int(constant) or not ((from_where >= 0) & (from_where < zeros.size)).all():
            return None
        taken[from_where.astype(np.int64)] = np.arange(zeros.size)
        if (taken < 0).any():
            return None
        moves = (taken != np.arange(zeros.size)).any() or shape != stored
        return Layout(stored, taken if moves else None, -float(constant))


def stored_parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters and buffers that a file has to hold, a tied one once, under the name that it has first."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found
