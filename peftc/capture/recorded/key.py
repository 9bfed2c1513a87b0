"""What determines a captured graph, as one digest: the code, the module tree, its plain attributes, the example.

A model of other code than torch's and transformers' has none, as what its code does beyond its own files is not known;
neither has one whose code, or whose library's, somebody changed in memory, nor one that holds what cannot be described.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import sys
import types
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from peftc.capture.inputs import Example
from peftc.capture.recorded.code import LIBRARIES, code_of, is_known, name_of
from peftc.capture.recorded.errors import NotRecordedError
from peftc.graph.ir import tensors

PLAIN = (bool, int, str, bytes, float, complex, type(None), torch.dtype, torch.device, torch.layout, torch.Size)
OF_MODULES = {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
TENSORS = (torch.Tensor, nn.Parameter, FakeTensor)  # what one of another class is may not show in its sizes
FEW = 1 << 16  # numbers of a tensor that is no parameter and no buffer
FORMAT = 2


def key_of(model: nn.Module, example: Example) -> str:
    """The same for two models exactly where they are captured as one graph.

    Raises:
        NotRecordedError: where that cannot be told.
    """
    described = _Described(model)
    try:
        everything = described.everything(example)
        told = (
            FORMAT, torch.__version__, transformers.__version__, sys.version_info[:2],
            _surroundings(), code_of(described.classes), everything,
        )  # fmt: skip
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()
    except RecursionError as error:
        raise NotRecordedError("what it holds lies too deep in one another") from error


def _surroundings() -> list[str]:
    """What code may go by without being told: of the process."""
    if module_hooks._has_any_global_hook():
        raise NotRecordedError("there are hooks on all modules")
    for mode in _get_current_function_mode_stack():
        if not isinstance(mode, DeviceContext):
            raise NotRecordedError(f"everything is called in a {type(mode).__qualname__}")
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    known = (torch.get_default_dtype(), torch.get_default_device(), torch.are_deterministic_algorithms_enabled())
    return [str(one) for one in (*known, *autocast)]


class _Described:
    """Things as lists that JSON can hold; one that occurs again is the number it had."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: dict[int, int] = {}
        self.held: list[Any] = []
        self.classes = {type(module): None for module in model.modules()}
        self.paths = {id(module): path for path, module in model.named_modules()}

    def everything(self, example: Example) -> Any:
        """Of the model and the example."""
        modules = [
            (path, f"{type(module).__module__}.{type(module).__qualname__}", self._attributes(module))
            for path, module in self.model.named_modules(remove_duplicate=False)
        ]
        for one in self.classes:
            if one.__module__.partition(".")[0] not in LIBRARIES:
                raise NotRecordedError(f"{one.__module__} is no library whose version tells its code")
        first: dict[int, int] = {}
        own = [
            (name, _sizes(tensor), first.setdefault(id(tensor), place))
            for place, (name, tensor) in enumerate(tensors(self.model).items())
        ]
        given = {
            name: _sizes(value) if isinstance(value, torch.Tensor) else self(value)
            for name, value in example.kwargs.items()
        }
        if example.args or type(example) is not Example:
            raise NotRecordedError("an input has no name, or is no plain one")
        return modules, own, given, self(example.constants), self(example.config), example.sizes.name

    def _attributes(self, module: nn.Module) -> Any:
        found = []
        for name, value in vars(module).items():
            hooks = name.startswith("_") and "hooks" in name
            if name in OF_MODULES or (hooks and (not value or "state_dict" in name)):
                continue
            if name == "forward" or hooks:
                raise NotRecordedError(f"{self.paths[id(module)]} has {name} of its own")
            found.append((name, self(value)))
        return found

    def __call__(self, value: Any) -> Any:
        if type(value) in PLAIN:
            return type(value).__name__, repr(value)
        if id(value) in self.seen:
            return "again", self.seen[id(value)]
        self.seen[id(value)] = len(self.held)
        self.held.append(value)  # so that no id is given again
        return self._described(value)

    def _described(self, value: Any) -> Any:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if not is_known(type(value).__module__):
            raise NotRecordedError(f"a {kind} is of other code")
        if isinstance(value, nn.Module):
            if id(value) not in self.paths:
                raise NotRecordedError(f"a module of {kind} stands outside of the model")
            return "module", self.paths[id(value)]
        if isinstance(value, torch.Tensor):
            return "tensor", _sizes(value), _numbers(value)
        if isinstance(value, enum.Enum):
            return kind, value.name
        if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType | types.MethodType):
            return self._code(value)
        if isinstance(value, functools.partial):
            return "partial", self(value.func), self(value.args), self(value.keywords)
        if isinstance(value, list | tuple):
            return kind, [self(one) for one in value]
        if isinstance(value, set | frozenset):
            return kind, sorted(json.dumps(self(one)) for one in value)
        if isinstance(value, dict):
            return kind, [(self(name), self(one)) for name, one in value.items()]
        if _is_of_attributes(type(value)):
            self.classes[type(value)] = None
            return kind, [(name, self(one)) for name, one in vars(value).items()]
        raise NotRecordedError(f"a {kind} is nothing that can be described")

    def _code(self, value: Any) -> Any:
        if isinstance(value, types.MethodType):
            return "method", self(value.__func__), self(value.__self__)
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, types.ModuleType | type | None):
            raise NotRecordedError(f"{value!r} is of something that is not described")
        if not isinstance(value, types.FunctionType):
            return "code", name_of(value)
        try:
            cells = [self(cell.cell_contents) for cell in value.__closure__ or ()]
        except ValueError as error:  # of an empty one
            raise NotRecordedError(f"{value!r} is not whole yet") from error
        return "code", name_of(value), cells, self(value.__defaults__), self(value.__kwdefaults__)


def _is_of_attributes(cls: type) -> bool:
    """Whether an object of a class is what its attributes say: one of C++ has more to it."""
    heap = 1 << 9  # Py_TPFLAGS_HEAPTYPE
    return cls.__module__.partition(".")[0] in LIBRARIES and all(
        base is object or (base.__flags__ & heap and is_known(base.__module__) and not vars(base).get("__slots__"))
        for base in cls.__mro__
    )


def _sizes(tensor: torch.Tensor) -> Any:
    if type(tensor) not in TENSORS:
        raise NotRecordedError(f"a {type(tensor).__qualname__} is no plain tensor")
    lies = [*tensor.stride(), tensor.storage_offset()] if tensor.layout is torch.strided else []
    return (
        type(tensor).__name__, [*tensor.shape], lies, str(tensor.dtype), str(tensor.device), tensor.requires_grad,
    )  # fmt: skip


def _numbers(tensor: torch.Tensor) -> str:
    if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.numel() > FEW or tensor.layout is not torch.strided:
        raise NotRecordedError("a tensor that is no parameter and no buffer has numbers that are not known")
    if tensor.is_quantized:
        raise NotRecordedError("a tensor is quantised")
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
